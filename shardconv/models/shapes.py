"""The shape that the array of each role has to have, so that a leaf which fits no model is said in words, and not by an einsum.

Sizes that the config tells are compared with it; those that it does not (`mlp`, `experts`) have to be the same for all arrays of a block.
"""

from collections.abc import Iterator, Mapping

from shardconv.errors import Problem
from shardconv.models.description import Decoder, Place, Reading

Shape = tuple[int, ...]

DIMS: Mapping[str, str] = {
    "embed": "vocab embed",
    "unembed": "embed vocab",
    "q": "embed heads head_dim",
    "k": "embed kv_heads head_dim",
    "v": "embed kv_heads head_dim",
    "o": "heads head_dim embed",
    "q_bias": "heads head_dim",
    "k_bias": "kv_heads head_dim",
    "v_bias": "kv_heads head_dim",
    "gate": "embed mlp",
    "up": "embed mlp",
    "down": "mlp embed",
    "gate_bias": "mlp",
    "up_bias": "mlp",
    "router": "embed experts",
    "router_bias": "experts",
    "experts_gate": "experts embed mlp",
    "experts_up": "experts embed mlp",
    "experts_down": "experts mlp embed",
    **dict.fromkeys(("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm", "final_norm", "o_bias", "down_bias"), "embed"),
}


def misshapen(reading: Reading, leaves: Mapping[str, Shape]) -> Iterator[Problem]:
    """A problem for each leaf, and no two, in which a role finds another shape than the model has."""
    told: set[str] = set()
    for places in (reading.ends, *reading.blocks):
        sizes = _sizes(reading.decoder)
        for role, place in places.items():
            fact = _misfit(role, _shape(place, leaves), sizes)
            if fact is not None and place.leaf not in told:
                told.add(place.leaf)
                yield Problem(f"{place.leaf} {fact}", "the layout's table and config.json do not belong together")


def _sizes(decoder: Decoder) -> dict[str, int]:
    return {"embed": decoder.embed, "heads": decoder.heads, "kv_heads": decoder.kv_heads, "head_dim": decoder.head_dim}


def _shape(place: Place, leaves: Mapping[str, Shape]) -> Shape:
    shape = leaves[place.leaf]
    return shape if place.index is None else shape[: place.axis] + shape[place.axis + 1 :]


def _misfit(role: str, shape: Shape, sizes: dict[str, int]) -> str | None:
    """What is wrong with a shape; sizes that nobody knew are learned from it."""
    dims = DIMS.get(role, "").split()
    if not dims:
        return None
    if len(shape) == len(dims):
        learned = dict(zip(dims, shape, strict=True))
        if all(dim == "vocab" or sizes.setdefault(dim, size) == size for dim, size in learned.items()):
            return None
    expected = " x ".join(f"{dim} {sizes[dim]}" if dim in sizes else dim for dim in dims)
    return f"gives {role} as {' x '.join(map(str, shape)) or 'a scalar'}, and should as {expected}"
