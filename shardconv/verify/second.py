"""The second statement of a whole checkpoint: the rows of its family and layout, with the numbers of its source.

Sizes come from the source's own shapes, as far as a pattern tells them; config.json is asked for head_dim, the layers and the experts. What
the user chose (dtypes, the order of rotary dims, padding) is applied here by this module's own reading of what the options mean.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import cast

from shardconv.errors import CheckError, Problem
from shardconv.verify import flat, maxtext
from shardconv.verify.rounding import bits, is_float
from shardconv.verify.rows import Row
from shardconv.verify.statement import Number, Origin, Reference, axes, dims, shape_of, whole
from shardconv.verify.tensors import Tensors

LAYOUTS = {"flat": flat.rows, "maxtext": maxtext.rows}
SLAB = 16 << 20  # bytes of two embeddings that are compared at a time


@dataclass(frozen=True, slots=True)
class Choices:
    """What the config says of the target: `dtype` may be "source", `rope` "auto"; "" and 0 are what is not chosen."""

    layout: str
    scan_layers: bool
    dtype: str
    query_dtype: str
    rope: str
    vocab_size: int


def references(tensors: Tensors, config: Mapping[str, object], family: str, choices: Choices) -> list[Reference] | None:
    """Every leaf as it should be, None where nobody has stated the family in this layout; raises CheckError for tensors it lacks."""
    rows = LAYOUTS[choices.layout](family, choices.scan_layers) if choices.layout in LAYOUTS else None
    if rows is None:
        return None
    binder = _Binder(tensors, config, family, choices)
    found = [reference for row in rows for reference in binder.bound(row)]
    if binder.missing:
        problems = [Problem(f"the source has no {key}") for key in binder.missing]
        raise CheckError(f"the source is no {family} model, as the check knows it", problems)
    return found


class _Binder:
    def __init__(self, tensors: Tensors, config: Mapping[str, object], family: str, choices: Choices) -> None:
        self.missing: list[str] = []
        self._tensors, self._config, self._family, self._choices = tensors, config, family, choices
        heads, hidden = self._number("num_attention_heads"), self._number("hidden_size")
        self._known = {
            "h": self._number("head_dim") or hidden // max(heads, 1),
            "l": self._number("num_hidden_layers"),
            "x": self._number("num_experts") or self._number("num_local_experts"),
        }
        self._interleaved = choices.rope == "interleaved" or (choices.rope == "auto" and self._llama3())

    def bound(self, row: Row) -> Iterator[Reference]:
        """The leaves of one row: one, or one for each layer."""
        if row.maybe and _key(row, row.first, 0) not in self._tensors:
            return
        if row.tensor == "lm_head.weight" and self._tied():
            return
        if "{l}" not in row.leaf:
            yield from self._leaf(row, row.leaf, row.first)
            return
        for place, layer in enumerate(range(row.first, self._known["l"], row.every)):
            yield from self._leaf(row, row.leaf.format(l=place), layer)

    def _leaf(self, row: Row, name: str, layer: int) -> Iterator[Reference]:
        left, right = row.left, row.right
        if row.rotated and self._interleaved:
            left = left.replace("h", "two p" if "(" in left else "(two p)")
            right = right.replace("h", "(p two)")
        sizes = self._sizes(row, left, layer)
        origin = self._origin(row, left, right, sizes, layer)
        shape = list(shape_of(right, sizes))
        put = whole(tuple(shape))
        lost = [key for key in origin.keys() if key not in self._tensors]
        if lost:
            self.missing += lost
            return
        if self._choices.vocab_size and "v" in dims(right):
            shape[dims(right).index("v")] = self._choices.vocab_size
        stored = self._tensors.dtype(next(origin.keys()))
        wanted = (row.values == "* query" and self._choices.query_dtype) or self._choices.dtype
        dtype = stored if wanted == "source" or not is_float(stored) else wanted
        yield Reference(name, tuple(shape), dtype, (replace(origin, put=put),))

    def _origin(self, row: Row, left: str, right: str, sizes: Mapping[str, int], layer: int) -> Origin:
        numbers = []
        if "{l}" in row.tensor:
            numbers.append(Number(row.first, (("l", row.every),)) if "l" in dims(right) else Number(layer, ()))
        if "{x}" in row.tensor:
            numbers.append(Number(0, (("x", 1),)))
        scale, shift = self._change(row)
        take = whole(shape_of(left, sizes))
        template = row.tensor.replace("{l}", "{}").replace("{x}", "{}")
        return Origin(template, tuple(numbers), left, right, sizes, take, (), scale, shift)

    def _sizes(self, row: Row, left: str, layer: int) -> dict[str, int]:
        """The size of every axis of a row: those that are known, and those that a tensor's shape tells."""
        known = self._known | {"two": 2, "p": self._known["h"] // 2, "l": len(range(row.first, self._known["l"], row.every))}
        key = _key(row, layer, 0)
        shape = self._tensors.shape(key) if key in self._tensors else ()
        for dim, size in zip(dims(left), shape, strict=False):
            unknown = [axis for axis in axes(dim) if axis not in known]
            if unknown:
                known[unknown[0]] = size // max(math.prod(known[axis] for axis in axes(dim) if axis in known), 1)
        return {axis: known.get(axis, 1) for axis in (*axes(left), *axes(row.right), "two", "p")}

    def _change(self, row: Row) -> tuple[float, float]:
        if row.values == "* query":
            scalar = self._number("query_pre_attn_scalar") if self._family == "gemma2" else self._known["h"]
            return float(scalar) ** -0.5, 0.0
        if row.values == "* embed":
            return float(self._number("hidden_size")) ** 0.5, 0.0
        return 1.0, 1.0 if row.values == "+ 1" else 0.0

    def _number(self, entry: str) -> int:
        return cast(int, self._config.get(entry) or 0)

    def _llama3(self) -> bool:
        """Whether MaxText rotates this model in pairs: Llama with llama3 frequencies."""
        scaling = self._config.get("rope_scaling") or self._config.get("rope_parameters") or {}
        kinds = (scaling.get("rope_type"), scaling.get("type")) if isinstance(scaling, Mapping) else ()
        return self._choices.layout == "maxtext" and self._family == "llama" and "llama3" in kinds

    def _tied(self) -> bool:
        """Whether the output projection is left out: config.json says tied, and the two tensors are the same bits."""
        said = self._config.get("tie_word_embeddings")
        if not (self._family == "gemma2" if said is None else said):
            return False
        tensors, first, second = self._tensors, "model.embed_tokens.weight", "lm_head.weight"
        if tensors.shape(first) != tensors.shape(second) or tensors.dtype(first) != tensors.dtype(second):
            return False
        rows = tensors.shape(first)[0]
        step = max(SLAB * rows // max(tensors.rows(first, 0, 1).nbytes * rows, 1), 1)
        cuts = [(low, min(low + step, rows)) for low in range(0, rows, step)]
        return all((bits(tensors.rows(first, *cut)) == bits(tensors.rows(second, *cut))).all() for cut in cuts)


def _key(row: Row, layer: int, expert: int) -> str:
    return row.tensor.format(l=layer, x=expert)

