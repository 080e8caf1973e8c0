"""The plain layout: nested canonical names, kernels [in, out], heads apart, nothing folded into values.

`layers.{layers}.attn.q` with dims `embed heads head_dim`; scanned, `layers.attn.q` with `layers` as the first dim. Experts are stacked
after `layers`. It is derived from the family's own rows, so that a new family has it for free. RoPE stays as the checkpoint has it (the
two halves of a head), norms and embeddings keep their bits; the numbers to apply at run time are in the checkpoint's metadata.
"""

from shardconv.axes import groups
from shardconv.family import Layout, LayoutOptions, Model, Param, Slot


def layout(model: Model, options: LayoutOptions) -> Layout:
    """The flat layout of a model."""
    slots = tuple(_slot(param, model, options) for param in model.params)
    metadata = {"scan_layers": options.scan_layers, "rope": "half", **model.facts}
    return Layout("flat", slots, {"vocab_pad": options.padding(model)}, metadata)


def _slot(param: Param, model: Model, options: LayoutOptions) -> Slot:
    dims = [_ungrouped(group) for group in groups(param.dims)]
    if param.linear:
        dims = [*dims[1:], dims[0]]
    stacked = [axis for axis in param.address(model.axes).named if axis != "layers"]
    text = " ".join([*stacked, *dims])
    if options.vocab_size:
        text = text.replace("vocab", "(vocab | vocab_pad)")
    dtype = options.query_dtype if param.name == "layers.attn.q" else ""
    if not param.name.startswith("layers."):
        return Slot(param.name, param.name, text, dtype=dtype)
    if options.scan_layers:
        return Slot(param.name, param.name, f"layers {text}", dtype=dtype)
    return Slot(param.name, param.name.replace("layers.", "layers.{layers}.", 1), text, dtype=dtype)


def _ungrouped(group: str) -> str:
    return group[1:-1] if group.startswith("(") and "|" not in group else group
