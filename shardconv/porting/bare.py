"""Bare parameters: those that are in no layer on either side, such as tokens, positions and scales.

PyTorch has them in modules of its users' own, where no rule knows them; a model has them as arrays of its own. One fits the other if their
shapes are the same but for dims of length one, which a token has before it in PyTorch, and if their names have a word in common. Of those
that a module has several, each is by itself.
"""

import itertools
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace

from shardconv.porting.moves import Bound, Move, Shapes, bound
from shardconv.porting.rules import Layer
from shardconv.porting.sizes import ALL

Views = Mapping[str, tuple[Layer, ...]]


def apart(views: Views, known: Set[str]) -> dict[str, tuple[Layer, ...]]:
    """The layers, with those that have several parameters, none of a name that a rule knows, as one for each.

    >>> token = Layer("embed", {"cls_token": "embed.cls_token", "mask_token": "embed.mask_token"})
    >>> list(apart({"embed": (token,)}, {"weight", "bias"}))
    ['embed.cls_token', 'embed.mask_token']
    """
    found: dict[str, tuple[Layer, ...]] = {}
    for name, seen in views.items():
        tensors = seen[-1].tensors
        if len(tensors) < 2 or not known.isdisjoint(tensors):
            found[name] = seen
        else:
            ones = {f"{name}.{inner}".removeprefix("."): {inner: expression} for inner, expression in tensors.items()}
            found |= {one: (replace(seen[-1], name=one, tensors=inside),) for one, inside in ones.items()}
    return found


def bare_move(
    layer: Layer, known: Set[str], stored: Sequence[int], array: str, tensors: Shapes, arrays: Shapes, stack: str = ""
) -> Bound | None:
    """What fills an array from a layer that is one parameter, of shape `stored`, or from a stack of such along the axis `stack`.

    None where it is a layer that rules know, the shapes are others, or the names have no word in common.
    """
    if len(layer.tensors) != 1 or not known.isdisjoint(layer.tensors) or array not in arrays:
        return None
    (source,) = layer.tensors.values()
    wanted = tuple(arrays[array])[bool(stack) :]
    if [length for length in stored if length > 1] != [length for length in wanted if length > 1]:
        return None
    dims, to = (ALL, ALL) if tuple(stored) == wanted else (_dims(stored), _dims(wanted))
    try:
        return bound(Move(str(source), dims, array, f"{stack} {to}".strip()), tensors, arrays)
    except ValueError:
        return None


def _dims(shape: Sequence[int]) -> str:
    """Dims that name the lengths above one by their place among these.

    >>> _dims((1, 4, 384)), _dims((4, 384))
    ('1 a0 a1', 'a0 a1')
    """
    places = itertools.count()
    return " ".join("1" if length == 1 else f"a{next(places)}" for length in shape)
