"""A row of a second statement: one leaf, one kind of source tensor, and how the one lies in the other.

`left` are the tensor's dims and `right` the leaf's, in the letters of `statement`; `l` and `x` on the right are stacked, unscanned layers
leave `l` out. `rotated` marks what RoPE turns dim by dim. `values` says what is done to values: "", "* query" (the attention scale),
"* embed" (sqrt of the hidden size), "+ 1". `maybe` marks a tensor that a checkpoint may lack, and the leaf with it.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One leaf of a layout; names have `{l}` where a layer's number goes, and `{x}` for an expert's."""

    leaf: str
    tensor: str
    left: str
    right: str
    rotated: bool = False
    values: str = ""
    maybe: bool = False
    first: int = 0  # of the layers that are stacked: every `every`-th from here
    every: int = 1
