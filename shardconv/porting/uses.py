"""Uses: what a model does with its arrays, found by following one run of it, for either side of a port.

A tracer (`torch_uses`, `jax_uses`) runs a model and tells a `Record` of each operation what it is made of. Three things are kept, all of
which a port has in common with the model that it is a port of, however either spells its operations:

    contracted   along which of its own axes an array is multiplied and summed; a lookup is a product with one-hot rows
    before       which arrays what it is combined with was computed from: a partial order, in which parallel branches have none
    inside       what the contracted axis of the other factor is made of, where that is a convolution's result: `c h w`, or `h w c`

    summed       of a product of two results, the factor whose axis is summed over later: an attention's keys, and not its queries
    bent         what comes to an elementwise product through something that is not linear, and what does not: a gate, and what it gates

The order in which code runs is not kept. Products of two results that both depend on arrays are in the order too, without a name: they are
what tells an attention's values from its queries and keys.

Reshaped, transposed or split, an array is still followed: its dims are made of *atoms*, which are digits of the indices along its axes.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

Shape = Sequence[int]


@dataclass(frozen=True, slots=True)
class Atom:
    """A digit of the index along an axis: (index // stride) % size. Axes of arrays are numbers, those of a convolution's result are `b`,
    `c`, `s0`, `s1`, those of product 7 of two results `7.0` or `7.1`, by the factor that they come from, and of "" nothing is known."""

    axis: int | str
    stride: int
    size: int


Sides = tuple[Sequence[int], Sequence[int]]  # dims of the two factors of a product
Dims = tuple[tuple[Atom, ...], ...]  # a tensor's dims, each a number of digits, outermost first; none for a dim of length one


def dims_of(shape: Shape, axes: Sequence[int | str] | None = None) -> Dims:
    """The dims of an array, of axes 0, 1, ... where these have no names.

    >>> dims_of((3, 1))
    ((Atom(axis=0, stride=1, size=3),), ())
    """
    named = range(len(shape)) if axes is None else axes
    return tuple((Atom(axis, 1, size),) if size != 1 else () for axis, size in zip(named, shape, strict=True))


def reshaped(dims: Dims, shape: Shape) -> Dims | None:
    """The dims after a reshape; None where it cuts through a digit unevenly.

    >>> reshaped(dims_of((6,)), (2, 3))
    ((Atom(axis=0, stride=3, size=2),), (Atom(axis=0, stride=1, size=3),))
    """
    atoms = [atom for dim in dims for atom in dim][::-1]
    found: list[tuple[Atom, ...]] = []
    for length in shape:
        dim: list[Atom] = []
        while length > 1:
            if not atoms:
                return None
            atom = atoms.pop()
            if length % atom.size and atom.size % length:
                return None
            if atom.size > length:
                inner = atom.size // length
                atoms.append(replace(atom, size=inner))
                atom = Atom(atom.axis, atom.stride * inner, length)
            dim.append(atom)
            length //= atom.size
        found.append(tuple(dim))
    return None if atoms else tuple(found)


def resized(dims: Dims, shape: Shape) -> Dims | None:
    """The dims of something with as many dims or more before them, along the same axes: a slice, a broadcast, a pooled image."""
    if len(dims) > len(shape):
        return None
    padded = ((),) * (len(shape) - len(dims)) + dims
    return tuple(_resized(dim, length) for dim, length in zip(padded, shape, strict=True))


def spread(dims: Dims, places: Sequence[int], shape: Shape) -> Dims | None:
    """The dims at these places of a shape, whose other dims repeat them."""
    at = dict(zip(places, dims, strict=True))
    return resized(tuple(at.get(place, ()) for place in range(len(shape))), shape)


def _resized(dim: tuple[Atom, ...], length: int) -> tuple[Atom, ...]:
    size = math.prod(atom.size for atom in dim)
    if size == length or length == 1:
        return dim if size == length else ()
    inner = math.prod(atom.size for atom in dim[1:])
    if dim and length % inner == 0:
        return (replace(dim[0], size=length // inner), *dim[1:])
    return (Atom("", 1, length),)


@dataclass(frozen=True, slots=True)
class Value:
    """What is known of a tensor in a run: the nodes that it depends on, as bits; whether the model's input went into it; the dims of data,
    and whether it went through anything that is not linear since it was contracted.

    What is made of arrays alone has none of these: its `parts` are the nodes of the arrays, and how the axes of each lie in it.
    """

    after: int = 0
    is_data: bool = False
    dims: Dims | None = None
    is_bent: bool = False
    parts: tuple[tuple[int, Dims | None], ...] = ()


Node = tuple[str, int | None]  # an array, or one of the layers that it stacks; "" and a number: a product of two results


@dataclass(frozen=True)
class Uses:
    """What a model does with its arrays. `before` has the nodes that each node comes after, as bits, `summed` those of a product's factor
    that is summed over, `bent` those that are bent before they are multiplied and those that are not; `inside` only what is known."""

    nodes: Mapping[Node, int]
    before: Sequence[int]
    summed: Mapping[int, int]
    bent: tuple[int, int]
    contracted: Mapping[str, frozenset[frozenset[Atom]]]
    inside: Mapping[str, tuple[Atom, ...]]

    def bits(self, names: Iterable[str], layer: int | None = None) -> int:
        """The nodes of some arrays, or of one layer of arrays that stack layers; 0 where they are not used."""
        return sum(1 << self.nodes[name, layer] for name in dict.fromkeys(names) if (name, layer) in self.nodes)

    def each(self, mask: int) -> list[int]:
        """The nodes whose bits are set."""
        return [node for node in range(mask.bit_length()) if mask >> node & 1]

    def contracts(self, arrays: Sequence[Sequence[str]]) -> bool:
        """Whether any of some arrays is known to be contracted."""
        return any(name in self.contracted for some in arrays for name in some)

    @property
    def products(self) -> list[int]:
        """The nodes that are no array's."""
        return [node for (name, _), node in self.nodes.items() if not name]


@dataclass
class Record:
    """A run as far as it has been followed."""

    nodes: dict[Node, int] = field(default_factory=dict)
    keys: list[Node] = field(default_factory=list)
    before: list[int] = field(default_factory=list)
    sides: dict[int, tuple[int, int]] = field(default_factory=dict)  # what the factors of each product depend on
    summed: dict[int, int] = field(default_factory=dict)
    bent: tuple[int, int] = (0, 0)
    contracted: dict[str, set[frozenset[Atom]]] = field(default_factory=dict)
    inside: dict[str, set[tuple[Atom, ...] | None]] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)  # arrays that are contracted along axes that could not be followed

    def uses(self, names: Mapping[str, Sequence[str]]) -> Uses:
        """What was seen, with the other names of arrays that have several."""
        nodes = {(other, k): node for (name, k), node in self.nodes.items() for other in names.get(name, (name,))}
        seen = {name: sets for name, sets in self.contracted.items() if name not in self.lost}
        contracted = {other: frozenset(sets) for name, sets in seen.items() for other in names.get(name, (name,))}
        single = {name: only for name, found in self.inside.items() for only in found if len(found) == 1 and only is not None}
        inside = {other: only for name, only in single.items() for other in names.get(name, (name,))}
        matrices = sum(1 << node for node, (name, _) in enumerate(self.keys) if name in self.contracted)
        bent = self.bent[0] & matrices, self.bent[1] & matrices  # a norm's scale may be put to what it divides by first
        return Uses(nodes, self.before, self.summed, bent, contracted, inside)

    def array(self, name: str, shape: Shape) -> Value:
        """One of the model's arrays."""
        return Value(parts=((self._node(name, None), dims_of(shape)),))

    def layer(self, value: Value, number: int) -> Value:
        """One layer of arrays that stack layers along their first axis, as a scan takes it."""
        parts = []
        for node, dims in value.parts:
            name, already = self.keys[node]
            whole = dims is not None and len(dims) > 0 and len(dims[0]) == 1 and dims[0][0].axis == 0 and already is None
            parts.append((self._node(name, number) if whole else node, dims[1:] if dims is not None else None))
        return replace(value, parts=tuple(parts), dims=value.dims[1:] if value.dims else None)

    def viewed(self, value: Value, moved: Callable[[Dims], Dims | None]) -> Value:
        """The same elements with dims that are moved."""
        dims = None if value.dims is None else moved(value.dims)
        return replace(value, dims=dims, parts=tuple((node, None if own is None else moved(own)) for node, own in value.parts))

    def combined(self, values: Sequence[Value], shape: Shape, bends: bool = False, orders: bool = True) -> Value:
        """The result of any operation that contracts nothing: sums, scales, activations, pooling, slices. `bends` says that it is not
        linear; one that does not order is a sum, whose terms may come in any order."""
        data = [value for value in values if value.is_data]
        if not data:
            parts: dict[int, Dims | None] = {}
            for node, dims in (part for value in values for part in value.parts):
                here = None if dims is None else resized(dims, shape)
                known = parts.get(node)
                parts[node] = here if known is None or known == here else known if here is None else None
            return Value(parts=tuple(parts.items()))
        after = 0
        for value in data:
            after |= value.after
        used = {node for value in values for node, _ in value.parts}
        for node in used if orders else ():
            self.before[node] |= after
        for node in used:
            after |= 1 << node
        followed = [value.dims for value in data if value.dims is not None and len(value.dims) == len(shape)]
        return Value(after, True, resized(followed[0], shape) if followed else None, bends or any(value.is_bent for value in data))

    def multiplied(self, one: Value, other: Value, shape: Shape) -> Value:
        """The result of an elementwise product."""
        both = one.is_data and other.is_data
        if both and one.is_bent != other.is_bent:
            gate, gated = (one, other) if one.is_bent else (other, one)
            self.bent = self.bent[0] | (gate.after & ~gated.after), self.bent[1] | (gated.after & ~gate.after)
        return self.combined([one, other], shape, bends=both)

    def product(self, one: Value, other: Value, sums: Sides, shape: Shape, free: Sides, join: bool = True) -> Value:
        """The result of a contraction, along dims `sums` of the one and of the other; `free` are the dims of the result that come from
        the one alone, and from the other."""
        self._contract(one, sums[0], other, sums[1])
        self._contract(other, sums[1], one, sums[0])
        found = self.combined([one, other], shape)
        if not found.is_data:
            return replace(found, parts=tuple((node, None) for node, _ in found.parts))
        found = replace(found, dims=None, is_bent=False)
        if not (join and one.is_data and other.is_data and one.after and other.after):
            return found
        node = self._node("", len(self.before))
        self.before[node] = found.after
        self.sides[node] = one.after, other.after
        labels = [""] * len(shape)
        for side, dims in enumerate(free):
            for dim in dims:
                labels[dim] = f"{node}.{side}"
        return replace(found, after=found.after | 1 << node, dims=dims_of(shape, labels))

    def looked_up(self, table: Value, rows: Value, axes: Sequence[int], shape: Shape) -> Value:
        """Rows of a table by numbers, along these dims of it."""
        if rows.is_data and not table.is_data:
            self._contract(table, axes, Value(is_data=True), ())
            return self.combined([table, rows], shape)
        found = self.combined([table, rows], shape)
        return replace(found, dims=None, parts=tuple((node, None) for node, _ in found.parts))

    def _contract(self, value: Value, axes: Sequence[int], other: Value, others: Sequence[int]) -> None:
        for atom in (atom for axis in axes for atom in (value.dims or ((),) * (axis + 1))[axis]):
            product, dot, side = str(atom.axis).partition(".")
            if dot:
                self.summed[int(product)] = self.summed.get(int(product), 0) | self.sides[int(product)][int(side)]
        if not other.is_data:
            return
        for node, dims in value.parts:
            name = self.keys[node][0]
            self.inside.setdefault(name, set()).add(_inside(other.dims, others))
            if dims is None:
                self.lost.add(name)
            else:
                atoms = frozenset(atom for axis in axes for atom in dims[axis] if atom.axis != "")
                self.contracted.setdefault(name, set()).add(atoms)

    def _node(self, name: str, layer: int | None) -> int:
        if (name, layer) not in self.nodes:
            self.nodes[name, layer] = len(self.before)
            self.keys.append((name, layer))
            self.before.append(0)
        return self.nodes[name, layer]


def _inside(dims: Dims | None, axes: Sequence[int]) -> tuple[Atom, ...] | None:
    """The digits that the contracted dims are made of."""
    if dims is None or len(axes) != 1:
        return None
    return dims[axes[0]]

