"""Device layout: source rows go to the devices as they lie, and the devices make the leaf of them.

Every stored tensor of a leaf is cut into row blocks, one for each device of the mesh, whatever the leaf's own sharding is. A process reads
the blocks of its devices and no other, so that all processes together read the source once. Then one compiled function does the rest on the
devices: it takes room and other parts away, views dims by their digits, transposes, stacks, pads with zeros, and gives the shards that the
sharding asks for; XLA puts in the exchange. The stored tensors that a leaf stacks are one array here, with a dim for each axis that was in
their names. A block is whole tensors as far as the mesh divides these dims, else rows of each.

The blocks lie along those mesh axes that the leaf wants for the same axes, so that what need not move between devices does not.

Devices move bits and compute nothing: values are cast, scaled and shifted by the host before they leave it, and travel as unsigned integers
until the leaf is complete, since an exchange may add them to zeros. So this is bit for bit what `host` gives. Functions are compiled once
for all leaves of equal shapes and shardings: what names the tensors is not in a `Recipe`.

Memory: on the host one block of one device; on the devices, while a leaf is made, its blocks, the leaf, and what XLA has in between. That
is asked of the compiled function before anything is read, since XLA copies an array whole to every device where it knows no other way from
one split to another. Over BETWEEN times a shard, rows are first split along no mesh axis that the leaf does not use; if that is over too,
`host` makes the leaf. All processes compile the same function, so they decide alike.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial, reduce
from operator import or_
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled

from shardconv.axes import Dim
from shardconv.boxes import Box, Interval, box_shape, chunk_box, grid_shape, slices
from shardconv.chunks import choose_chunk
from shardconv.dtypes import dtype_named, dtype_of_code, raw_view
from shardconv.formats import Tensor
from shardconv.formats.reading import Reader
from shardconv.leaf import Leaf, Part
from shardconv.mesh import host
from shardconv.mesh.host import boxes_here, empty, on, require_held
from shardconv.run.work import Workspace
from shardconv.sharding import split_by
from shardconv.values import ValueRule, convert

Array = npt.NDArray[Any]

# Compiled functions kept: a model has some twenty kinds of leaves.
KINDS = 256

# What a device may have in between, as a multiple of its shard: the ways that XLA knows take up to about three.
BETWEEN = 3.5
# Bytes that it may have in any case: what XLA needs for a small leaf is more a matter of rounding than of the leaf's size.
SPARED = 1 << 20


@dataclass(frozen=True, slots=True)
class Recipe:
    """How rows become one part's share of a leaf; no names in it, so that equal layers have equal recipes.

    The rows are an array (*stack, rows, *rest): the needed box of each stored tensor, under the axes that are in the tensors' names.
    """

    stack: tuple[int, ...]
    rows: int
    rest: tuple[int, ...]
    digits: tuple[int, ...]  # the box by source digits
    kept: Box  # what is the part's of each, stack and digits
    order: tuple[int, ...]  # stack and digits in the order of the target digits
    sizes: tuple[int, ...]  # lengths of the target digits
    room: tuple[Interval, ...]  # and the zeros before and after each
    shape: tuple[int, ...]
    spread: tuple[tuple[str, ...], ...]  # mesh axes along which each dim of the stack, and the rows, are cut

    def given(self, axes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of the rows on a mesh of these axes, zeros behind the last included."""
        blocks = math.prod(axes[name] for name in self.spread[-1])
        return (*self.stack, -(-self.rows // blocks) * blocks, *self.rest)

    def apply(self, rows: jax.Array) -> jax.Array:
        """The share, with zeros where other parts or nothing belong; traced, on raw integers."""
        place = len(self.stack)
        if rows.shape[place] > self.rows:  # rows of zeros behind the last, which made the blocks equal
            rows = lax.slice_in_dim(rows, 0, self.rows, axis=place)
        found = rows.reshape(self.stack + self.digits)
        if box_shape(self.kept) != found.shape:
            found = lax.slice(found, [start for start, _ in self.kept], [stop for _, stop in self.kept])
        found = found.transpose(self.order).reshape(self.sizes)
        if any(before or after for before, after in self.room):
            found = lax.pad(found, np.zeros((), found.dtype), [(before, after, 0) for before, after in self.room])
        return found.reshape(self.shape)


@dataclass(frozen=True, slots=True)
class Share:
    """One part of a leaf as the devices take it: `box` of each tensor that the axes `named` number, and what becomes of them."""

    part: Part
    named: tuple[str, ...]
    box: Box
    recipe: Recipe


def place(
    leaf: Leaf,
    sharding: NamedSharding,
    stored: Mapping[str, Tensor],
    reader: Reader,
    workspace: Workspace,
    tile_bytes: int,
) -> jax.Array:
    """The leaf as an array of `sharding`, made by the devices, or by `host` where they would need too much memory for it.

    Rows that are converted first are converted `tile_bytes` at a time.

    Every process of the program calls it, for the same leaves in the same order. Raises InputError or RunError where the source cannot be
    read, and ValueError for elements that are no multiple of a byte up to four, see `choosing.can_exchange`.
    """
    require_held(leaf.dtype)
    mesh = Mesh(sharding.mesh.devices, sharding.mesh.axis_names)  # of automatic axes, whatever theirs are
    plain = NamedSharding(mesh, sharding.spec)
    meant = read_as(leaf.dtype, plain)
    shares = [share(part, _entries(plain.spec, len(leaf.shape)), dict(mesh.shape)) for part in leaf.parts]
    relayout = compiled(tuple(one.recipe for one in shares), plain, dtype_named(leaf.dtype).numpy.itemsize)
    if relayout is None:
        return host.place(leaf, sharding, stored, reader, workspace, tile_bytes)
    rows = [_rows(one, leaf, mesh, stored, reader, workspace, tile_bytes) for one in shares]
    _wait_for_others()
    raw = jax.block_until_ready(relayout(*rows))
    for one in rows:
        one.delete()
    made: jax.Array = jax.block_until_ready(meant(raw))
    if made.sharding == sharding:
        return made
    target = [jax.device_put(shard.data, on(shard.device, sharding)) for shard in made.addressable_shards]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, target)


def _wait_for_others() -> None:
    """Wait for all processes: devices that exchange for the first time give up on those that are half a minute late."""
    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices("shardconv: rows are on their devices")


@lru_cache(maxsize=KINDS)
def compiled(recipes: tuple[Recipe, ...], sharding: NamedSharding, itemsize: int) -> Compiled | None:
    """The function that makes a leaf, as raw integers of `itemsize` bytes, of the rows of its parts, of which it may use up one part's.

    None where each such function has more in between than a device may hold.
    """
    mesh = sharding.mesh
    used = set(itertools.chain(*_entries(sharding.spec, len(recipes[0].shape))))
    spreads = [NamedSharding(mesh, PartitionSpec(*recipe.spread)) for recipe in recipes]
    fewer = [NamedSharding(mesh, PartitionSpec(*(tuple(a for a in dim if a in used) for dim in recipe.spread))) for recipe in recipes]
    shapes = [recipe.given(dict(mesh.shape)) for recipe in recipes]
    rows = [jax.ShapeDtypeStruct(shape, f"u{itemsize}", sharding=spread) for shape, spread in zip(shapes, spreads, strict=True)]
    shard = math.prod(sharding.shard_shape(recipes[0].shape))
    given = next((number for number, one in enumerate(rows) if math.prod(spreads[number].shard_shape(one.shape)) == shard), None)

    def leaf(first: Sequence[NamedSharding] | None, *rows: jax.Array) -> jax.Array:
        if first is not None:
            rows = tuple(lax.with_sharding_constraint(part, one) for part, one in zip(rows, first, strict=True))
        # The parts fill different places, and zeros the others.
        return reduce(or_, (recipe.apply(part) for recipe, part in zip(recipes, rows, strict=True)))

    for first in (None, fewer) if fewer != spreads else (None,):
        made = jax.jit(partial(leaf, first), out_shardings=sharding, donate_argnums=() if given is None else given).lower(*rows).compile()
        if between(made) <= max(BETWEEN * shard * itemsize, SPARED):
            return made
    return None


def between(made: Compiled) -> int:
    """Bytes that a compiled function has on one device besides what it takes and gives; 0 where the backend does not say."""
    used = made.memory_analysis()
    return 0 if used is None else int(used.temp_size_in_bytes)


@lru_cache(maxsize=KINDS)
def read_as(dtype: str, sharding: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    """The function that takes raw integers for the bits of a dtype, in their place.

    It is one by itself since XLA for the CPU makes some NaNs others where it takes bits for bfloat16 and pads or selects in one loop.
    """
    target = dtype_named(dtype)
    if target.bits not in (8, 16, 32):
        raise ValueError(f"devices do not lay out {dtype}")

    def meant(raw: jax.Array) -> jax.Array:
        if target.numpy == np.bool_:
            return raw != np.zeros((), raw.dtype)
        return raw if raw.dtype == target.numpy else lax.bitcast_convert_type(raw, target.numpy)

    return jax.jit(meant, out_shardings=sharding, donate_argnums=0)


def share(part: Part, spec: Sequence[tuple[str, ...]], axes: Mapping[str, int]) -> Share:
    """A part as the devices take it; `spec` is the mesh axes of each dim of the leaf, `axes` the sizes of all mesh axes.

    >>> from shardconv.axes import address
    >>> sizes = {"layers": 4, "embed": 6, "mlp": 8}
    >>> up = Part("up", ("BF16",), address("{layers}.up", "mlp embed", sizes), address("wi", "embed layers mlp", sizes), {}, ValueRule())
    >>> share(up, (("x",), (), ("y",)), {"x": 2, "y": 2}).recipe.spread
    (('x',), ('y',))
    """
    ranges = {axis: (0, size) for axis, size in part.source.sizes.items()}
    ranges |= {axis: (i, i + 1) for axis, i in part.index.items()}
    named = tuple(axis for axis in part.source.named if axis not in part.index)
    sides = [_side(dim, ranges) for dim in part.source.dims]
    box = tuple(side for side, _, _ in sides)
    kept: Box = (*((0, part.source.named[axis]) for axis in named), *itertools.chain(*(within for _, _, within in sides)))
    found = [*named, *(digit.axis for dim in part.source.dims for digit in dim)]
    wanted = [digit for dim in part.target.dims for digit in dim]
    order = [found.index(digit.axis) for digit in wanted]
    stack = tuple(part.source.named[axis] for axis in named)
    lengths = box_shape(box) or (1,)
    recipe = Recipe(
        stack=stack,
        rows=lengths[0],
        rest=lengths[1:],
        digits=tuple(itertools.chain(*(lengths for _, lengths, _ in sides))),
        kept=kept,
        order=(*order, *(place for place in range(len(found)) if place not in order)),
        sizes=tuple(digit.size for digit in wanted),
        room=tuple((digit.offset, digit.radix - digit.offset - digit.size) for digit in wanted),
        shape=part.target.shape,
        spread=_spread(part, named, ranges, spec, axes),
    )
    return Share(part, named, box, recipe)


def _side(dim: Dim, ranges: Mapping[str, Interval]) -> tuple[Interval, list[int], list[Interval]]:
    """What of a stored dim is read, the lengths by which that is viewed, and what of each digit is the part's.

    Read is one interval: of the first digit that has more than one index what is the part's, of those behind it all.
    """
    if not dim:
        return (0, 1), [], []
    mine = [(ranges[digit.axis][0] + digit.offset, ranges[digit.axis][1] + digit.offset) for digit in dim]
    cut = next((place for place, (start, stop) in enumerate(mine) if stop - start > 1), len(dim) - 1)
    first = 0
    for digit, (start, _) in zip(dim[: cut + 1], mine, strict=False):
        first = first * digit.radix + start
    behind = [digit.radix for digit in dim[cut + 1 :]]
    inner, length = math.prod(behind), mine[cut][1] - mine[cut][0]
    lengths, kept = [1] * cut + [length, *behind], [(0, 1)] * cut + [(0, length), *mine[cut + 1 :]]
    return (first * inner, (first + length) * inner), lengths, kept


def _spread(
    part: Part, named: Sequence[str], ranges: Mapping[str, Interval], spec: Sequence[tuple[str, ...]], axes: Mapping[str, int]
) -> tuple[tuple[str, ...], ...]:
    """Along which mesh axes the rows are cut: those that split the same axis of the leaf first, then the others, stack before rows."""
    first = part.source.dims[0] if part.source.dims else ()
    outer = next((digit.axis for digit in first if ranges[digit.axis][1] - ranges[digit.axis][0] > 1), "")
    left = {axis: part.source.named[axis] for axis in named}
    spread: dict[str, list[str]] = {axis: [] for axis in named}
    rows: list[str] = []
    rest = [name for name, size in axes.items() if size > 1]
    for dim, entry in zip(part.target.dims, spec, strict=True):
        axis = next((digit.axis for digit in dim if digit.size > 1), "")
        for name in (name for name in entry if name in rest):
            if axis in left and left[axis] % axes[name] == 0:
                spread[axis].append(name)
                left[axis] //= axes[name]
                rest.remove(name)
            elif axis == outer:
                rows.append(name)
                rest.remove(name)
    for name in rest:
        axis = next((axis for axis, size in left.items() if size % axes[name] == 0), "")
        if axis:
            left[axis] //= axes[name]
        (spread[axis] if axis else rows).append(name)
    return (*(tuple(spread[axis]) for axis in named), tuple(rows))


def _entries(spec: PartitionSpec, dims: int) -> list[tuple[str, ...]]:
    """The mesh axes of each dim; a PartitionSpec may leave out dims at the end."""
    entries = split_by(spec)
    return entries + [()] * (dims - len(entries))


def _rows(
    share: Share, leaf: Leaf, mesh: Mesh, stored: Mapping[str, Tensor], reader: Reader, workspace: Workspace, tile_bytes: int
) -> jax.Array:
    """The rows of a part as one array of raw integers, of which this process reads the blocks of its own devices."""
    shape = share.recipe.given(dict(mesh.shape))
    sharding = NamedSharding(mesh, PartitionSpec(*share.recipe.spread))
    dtype = dtype_named(leaf.dtype).numpy
    arrays = []
    for device, box in boxes_here(shape, sharding).items():
        block = empty(box_shape(box), dtype)
        filled = min(box[len(share.named)][1], share.recipe.rows)
        if filled < box[len(share.named)][1]:
            raw_view(block).fill(0)
        for out, key, part in _parts_of_block(share, box, filled, block):
            _fill(stored[key], part, share.part.rule, reader, workspace, tile_bytes, out)
        arrays.append(jax.device_put(raw_view(block), device))
        jax.block_until_ready(arrays[-1])
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _parts_of_block(share: Share, box: Box, filled: int, block: Array) -> Iterator[tuple[Array, str, Box]]:
    """For each tensor of a block its place there, its name, and the box of it that is read."""
    stack, (start, _) = box[: len(share.named)], box[len(share.named)]
    if start >= filled:
        return
    for values in itertools.product(*(range(*side) for side in stack)):
        index = dict(share.part.index) | dict(zip(share.named, values, strict=True))
        place = tuple(value - first for value, (first, _) in zip(values, stack, strict=True))
        out = block[place][: filled - start]
        if not share.box:
            yield out.reshape(()), share.part.source.key(index), ()
            continue
        (first, _), *others = share.box
        yield out, share.part.source.key(index), ((first + start, first + filled), *others)


def _fill(
    tensor: Tensor, box: Box, rule: ValueRule, reader: Reader, workspace: Workspace, tile_bytes: int, out: Array
) -> None:
    """Reads a box of a tensor into `out`, as the rule wants its values."""
    source = dtype_of_code(tensor.dtype).numpy
    if rule.moves and source == out.dtype:
        reader.read(tensor, box, out)
        return
    shape = box_shape(box)
    wide = max(source.itemsize, out.itemsize)
    tile, _ = choose_chunk(shape, itemsize=wide, limit=max(tile_bytes, wide), shards=(1,) * len(shape), order=range(len(shape)))
    for number in range(math.prod(grid_shape(shape, tile))):
        within = chunk_box(shape, tile, number)
        block = workspace.array("rows", box_shape(within), source)
        reader.read(tensor, tuple((a + start, a + stop) for (a, _), (start, stop) in zip(box, within, strict=True)), block)
        convert(block, rule, out[slices(within)])  # cut from the outermost dim inwards, so it lies in one piece
