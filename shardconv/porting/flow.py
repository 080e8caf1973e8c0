"""Flow: what two followed runs, of a PyTorch model and of its port, say of which layer is which. Three things, each a necessary condition:

    turned      a move takes the axes that the stored tensor is contracted along to those that the array is contracted along
    narrowed    layers come after one another as their places do: colours of both partial orders are refined together, by those of all that
                is before and after a node, and a layer can only be where its colour is
    flattened   where a convolution's result is flattened in another order, the fully connected layer's inputs are put in that order

None of them uses the order in which code runs, nor a name. Layers that are alike in all of this, as queries and keys of one shape are, keep
one colour, and stay open. Where the two orders are not the same one, nothing is taken from either.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shardconv.axes import Address, groups
from shardconv.porting.folding import names, parsed
from shardconv.porting.moves import Bound, Move, Shapes, bound
from shardconv.porting.uses import Atom, Uses

Options = Mapping[str, Sequence[str]]  # layers, and the places that each may have
# What is compared of two runs, beside the order of their arrays: all of it, or what is left of that.
SAID = (frozenset({"products", "summed", "bent"}), frozenset({"products", "bent"}), frozenset({"products"}), frozenset[str]())
Numbers = dict[tuple[str, int], int]
SPACE = {1: "w", 2: "hw", 3: "dhw"}


@dataclass(frozen=True)
class Members:
    """The arrays of a layer or of a place, by name; of a layer that stands for several those of each."""

    arrays: Sequence[Sequence[str]]
    stacked: bool = False

    def bits(self, uses: Uses, count: int, stacked: bool) -> list[int]:
        """The nodes of each of `count` members; of a place of stacked layers, its arrays are the same for all."""
        if not stacked:
            return [uses.bits(self.arrays[0])]
        if self.stacked:
            return [uses.bits(arrays) for arrays in self.arrays]
        return [uses.bits(self.arrays[0], number) for number in range(count)]


@dataclass(frozen=True)
class Flow:
    """What both sides do with their arrays."""

    torch: Uses
    jax: Uses

    def turned(self, moves: Sequence[Bound]) -> bool:
        """Whether all moves take contracted axes to contracted axes, as far as these are known. One side may have uses that the other has
        not: weights that are tied on one side only, or what a run did not come to."""
        return all(
            there <= here or here <= there
            for move in moves
            for key, _ in move.source.keys()
            for name in names(parsed(key))
            for target, _ in move.target.keys()
            if (there := _contracted(self.torch, name, move.source)) and (here := _contracted(self.jax, target, move.target))
        )

    def flattened(self, moves: Sequence[Bound], tensors: Shapes, arrays: Shapes) -> list[Bound]:
        """The moves, with a matrix's inputs in the order in which each side flattens them."""
        return [self._flattened(move, tensors, arrays) for move in moves]

    def _flattened(self, move: Bound, tensors: Shapes, arrays: Shapes) -> Bound:
        there, here = (uses.inside.get(side.name, ()) for uses, side in ((self.torch, move.source), (self.jax, move.target)))
        along = _contracted(self.torch, move.source.name, move.source)
        if there == here or Counter(there) != Counter(here) or len(along) != 1 or len(*along) != 1:
            return move
        ((axis,),) = along
        labels = [str(atom.axis) for atom in there]
        space = SPACE.get(sum(label.startswith("s") for label in labels), "")
        called = {"c": "c", **{f"s{place}": letter for place, letter in enumerate(space)}}
        one = groups(move.move.dims).count(axis) == groups(move.move.to).count(axis) == 1
        if not one or len(set(labels)) < len(labels) or any(atom.stride > 1 or atom.axis not in called for atom in there):
            return move
        spelt = [f"({' '.join(called[str(atom.axis)] for atom in side)})" for side in (there, here)]
        dims, to = (re.sub(rf"\b{axis}\b", text, side) for text, side in zip(spelt, (move.move.dims, move.move.to), strict=True))
        sizes = {called[str(atom.axis)]: atom.size for atom in here if str(atom.axis).startswith("s")}
        found = Move(move.move.source, dims, move.move.target, to, move.move.part, move.move.into, {**move.move.sizes, **sizes})
        return bound(found, tensors, arrays)

    def narrowed(
        self, options: Options, layers: Mapping[str, Members], places: Mapping[str, Members], settled: Mapping[str, str]
    ) -> Options:
        """The places that each layer may still have when those in `settled` have theirs; `options` where the orders differ."""
        parts = {place for place in places if not _is_whole(place, places)} | set(settled.values())
        for said in SAID:
            for contracting in (False, True):
                kept = {layer: [place for place in found if place not in parts] for layer, found in options.items()}
                kept |= {layer: [place] for layer, place in settled.items()}
                found = self._narrowed(options, kept, layers, places, said, contracting)
                options = options if found is None else found
                if found is not None and all(len(places) < 2 for places in options.values()):
                    return options
        return options

    def _narrowed(
        self,
        options: Options,
        kept: Options,
        layers: Mapping[str, Members],
        places: Mapping[str, Members],
        said: frozenset[str],
        contracting: bool,
    ) -> Options | None:
        """As `narrowed`, by what is in `said`, of all arrays or of those that are contracted; None where it differs. `kept` are the options
        without places that are taken, or parts of others."""
        there: list[tuple[object, int]] = []
        here: list[tuple[object, int]] = []
        at: tuple[Numbers, Numbers] = {}, {}  # where each layer's and each place's members are in these
        for group, (some, fitting) in enumerate(_components(kept)):
            sizes = {len(layers[layer].arrays) for layer in some}
            stacked = {layers[layer].stacked for layer in some}
            if len(some) != len(fitting) or len(sizes) != 1 or len(stacked) != 1:
                continue
            (size,), (is_stack,) = sizes, stacked
            bits = {layer: layers[layer].bits(self.torch, size, is_stack) for layer in some}
            others = {place: places[place].bits(self.jax, size, is_stack) for place in fitting}
            if not all(mask for masks in (*bits.values(), *others.values()) for mask in masks):
                continue
            known = [self.torch.contracts(layers[layer].arrays) for layer in some]
            known += [self.jax.contracts(places[place].arrays) for place in fitting]
            if contracting and not all(known):
                continue
            for nodes, numbered, masks in ((there, at[0], bits), (here, at[1], others)):
                for name, each in masks.items():
                    for number, mask in enumerate(each):
                        numbered[name, number] = len(nodes)
                        nodes.append(((group, number), mask))
        if "products" in said:
            there += [("product", 1 << node) for node in self.torch.products]
            here += [("product", 1 << node) for node in self.jax.products]
        colours = _colours([there, here], [self.torch, self.jax], said)
        if colours is None:
            return None
        left, right = colours
        of_layer = {member: left[node] for member, node in at[0].items()}
        of_place = {member: right[node] for member, node in at[1].items()}
        found = {layer: list(listed) for layer, listed in options.items()}
        for layer, listed in options.items():
            if (layer, 0) in of_layer:
                count = range(len(layers[layer].arrays))
                found[layer] = [place for place in listed if all(of_place.get((place, k)) == of_layer[layer, k] for k in count)]
        return found if all(found[layer] or not options[layer] for layer in options) else None


def _contracted(uses: Uses, name: str, address: Address) -> frozenset[frozenset[str]]:
    """The axes of an address along which a tensor is contracted, for each way in which it is; empty where nothing is known."""
    return frozenset(frozenset(_axes(atoms, address)) for atoms in uses.contracted.get(name, ()))


def _axes(atoms: frozenset[Atom], address: Address) -> set[str]:
    found = set()
    for place, dim in enumerate(address.dims):
        stride = 1
        for digit in reversed(dim):
            if any(atom.axis == place and max(atom.stride, stride) < min(atom.stride * atom.size, stride * digit.size) for atom in atoms):
                found.add(digit.axis)
            stride *= digit.radix
    return found


def _is_whole(place: str, places: Mapping[str, Members]) -> bool:
    """Whether a place is no part of another one."""
    own = set(places[place].arrays[0])
    return not any(own < set(other.arrays[0]) for other in places.values())


def _components(options: Options) -> list[tuple[list[str], list[str]]]:
    """Layers and places that have to do with each other."""
    of: dict[str, int] = {}
    found: list[tuple[list[str], list[str]]] = []
    for layer, places in options.items():
        joined = {of[place] for place in places if place in of}
        group = min(joined, default=len(found))
        if group == len(found):
            found.append(([], []))
        for other in joined - {group}:
            for place in found[other][1]:
                of[place] = group
            found[group][0].extend(found[other][0])
            found[group][1].extend(found[other][1])
            found[other] = ([], [])
        found[group][0].append(layer)
        for place in places:
            if place not in of:
                of[place] = group
                found[group][1].append(place)
    return [(layers, places) for layers, places in found if layers and places]


def _colours(sides: Sequence[Sequence[tuple[object, int]]], uses: Sequence[Uses], said: frozenset[str]) -> list[list[int]] | None:
    """The colours of the nodes of both orders; None where the two have other colours, or as many of one."""
    orders = [_relations([mask for _, mask in side], own, said) for side, own in zip(sides, uses, strict=True)]
    seen: dict[object, int] = {}
    colours = []
    for side, own in zip(sides, uses, strict=True):
        bent = [tuple("bent" in said and bool(mask & other) for other in own.bent) for _, mask in side]
        colours.append([seen.setdefault((start, how), len(seen)) for (start, _), how in zip(side, bent, strict=True)])
    random = np.random.default_rng(0)
    while True:
        if Counter(colours[0]) != Counter(colours[1]):
            return None
        numbers = random.integers(1 << 62, size=len(seen), dtype=np.uint64)
        again: dict[object, int] = {}
        finer = []
        for coloured, relations in zip(colours, orders, strict=True):
            mine = numbers[np.array(coloured, int)]
            sums = [[int(mine[row].sum()) for row in relation] for relation in relations]
            finer.append([again.setdefault(key, len(again)) for key in zip(coloured, *sums, strict=True)])
        if len(again) == len(seen):
            return colours
        colours, seen = finer, again


Relation = np.ndarray[tuple[int, int], np.dtype[np.bool_]]


def _relations(masks: Sequence[int], uses: Uses, said: frozenset[str]) -> list[Relation]:
    """Which node, a column, is before which, a row, and which is summed over in a product; and both the other way round."""
    order = np.zeros((len(masks), len(masks)), bool)
    sums = np.zeros((len(masks), len(masks)), bool)
    for row, mask in enumerate(masks):
        before, summed = 0, 0
        for node in uses.each(mask):
            before |= uses.before[node]
            summed |= uses.summed.get(node, 0)
        before &= ~mask
        order[row] = [bool(other & before) for other in masks]
        if summed and "summed" in said:
            sums[row] = [bool(other & summed) for other in masks]
    return [order, order.T, sums, sums.T]
