"""Layers: a state dict taken apart into the layers that its names belong to.

A name is a layer's and one inside it: `encoder.0.fc.weight` is `weight` of layer `encoder.0.fc`. Three things are put right on the way:
attention's `out_proj` is part of the layer above it; a recurrent layer's `weight_ih_l0_reverse` is `weight_ih` of the layer
`lstm.l0_reverse`, since a JAX cell is one direction of one layer; and of a weight that torch keeps as a product, such as
`weight_g` and `weight_v`, the product is the weight.
"""

import re
from collections.abc import Iterable, Mapping

from shardconv.porting.folding import Call, Expression
from shardconv.porting.rules import Layer

CELL = re.compile(r"(weight_ih|weight_hh|weight_hr|bias_ih|bias_hh)_(l[0-9]+(?:_reverse)?)")

# How torch keeps a weight that is computed, by its names in a state dict: torch.nn.utils' own, and those of its parametrizations.
NORMED = (
    ("weight_norm", ("weight_g", "weight_v")),
    ("weight_norm", ("parametrizations.weight.original0", "parametrizations.weight.original1")),
    ("spectral_norm", ("weight_orig", "weight_u", "weight_v")),
    ("spectral_norm", ("parametrizations.weight.original", "parametrizations.weight.0._u", "parametrizations.weight.0._v")),
)
INNER = ("parametrizations.weight.original0", "parametrizations.weight.original1", "parametrizations.weight.original")
INSIDE = (*INNER, "parametrizations.weight.0._u", "parametrizations.weight.0._v")


def layers_of(names: Iterable[str], kinds: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[Layer, ...]]:
    """The layers by name, in the order of the names; of a weight-normalised one two views: folded, and as it is stored.

    `kinds` are the classes of the modules, as far as known.

    >>> [layer.name for layers in layers_of(["fc.weight", "fc.bias", "out.weight"], {}).values() for layer in layers]
    ['fc', 'out']
    """
    grouped: dict[str, dict[str, Expression]] = {}
    listed = list(names)
    attention = {name.rpartition(".")[0] for name in listed if re.search(r"(^|\.)(in_proj|q_proj)_weight$", name)}
    for name in listed:
        layer, inner = _placed(name, attention)
        grouped.setdefault(layer, {})[inner] = name
    found = {}
    for layer, tensors in grouped.items():
        known = kinds.get(layer) or kinds.get(layer.rpartition(".")[0] if _is_cell(layer) else layer, ())
        found[layer] = tuple(Layer(layer, view, known) for view in _views(tensors))
    return found


def _placed(name: str, attention: set[str]) -> tuple[str, str]:
    """The layer of a tensor, and its name in there."""
    for inside in INSIDE:
        if name == inside or name.endswith("." + inside):
            return name.removesuffix(inside).removesuffix("."), inside
    layer, _, inner = name.rpartition(".")
    above, _, last = layer.rpartition(".")
    if last == "out_proj" and above in attention:
        return above, f"out_proj.{inner}"
    if cell := CELL.fullmatch(inner):
        return f"{layer}.{cell[2]}".removeprefix("."), cell[1]
    return layer, inner


def _is_cell(layer: str) -> bool:
    return re.fullmatch(r"l[0-9]+(_reverse)?", layer.rpartition(".")[2]) is not None


def _views(tensors: Mapping[str, Expression]) -> list[dict[str, Expression]]:
    """A layer with its computed weight as `weight`, and as it is stored, which is `weight_g` and `weight_v`."""
    for function, parts in NORMED:
        if all(part in tensors for part in parts):
            rest = {name: value for name, value in tensors.items() if name not in parts}
            folded = {"weight": Call(function, tuple(tensors[part] for part in parts)), **rest}
            stored = {"weight_g": tensors[parts[0]], "weight_v": tensors[parts[1]], **rest}
            return [folded, stored] if function == "weight_norm" else [folded]
    return [dict(tensors)]
