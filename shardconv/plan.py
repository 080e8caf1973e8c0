"""The plan: all that a conversion will do, as frozen values, from headers alone.

A *leaf* is one array of the target tree, made of *parts*: parameters, each with the address it comes from and the address it goes to. A
leaf is cut into chunks; a *unit* is the resumable, repeatable piece of work, a run of whole chunks that no other unit touches. Everything
a worker needs is in here (`to_json`), nothing is decided later, and nothing is read but headers, so it takes seconds for any model.

Memory: at its peak a worker holds, for one chunk, the source rows of a piece, the chunk being filled, and the chunk before it, which is
being encoded and written. `Plan.peak_bytes` is that sum for the largest chunk, and chunks are cut so that it stays under the budget.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pydantic import TypeAdapter

from shardconv.axes import Address, Axes, Dim, address
from shardconv.boxes import Box, box_shape, chunk_box, grid_shape
from shardconv.chunks import choose_chunk, cut_order
from shardconv.coverage import TIED, is_tied, require_covered
from shardconv.dtypes import dtype_named, dtype_of_code
from shardconv.errors import InputError, Problem
from shardconv.family import Layout, Model, Param, Slot
from shardconv.formats import StoredTensor
from shardconv.route import Piece, pieces
from shardconv.runs import RUNS_PER_REQUEST, byte_runs, coalesce
from shardconv.sharding import MeshRules, Spec, misfits, partition, shards
from shardconv.source import Source
from shardconv.values import ValueRule, is_exact, is_float

# Copies of a chunk that a worker holds besides the source rows: the one being filled, the one being written, and the encoder's.
COPIES = 3

# Bytes between two runs of a box that are read, and thrown away, to save a request: about what a request to a local disk costs.
READ_GAP = 64 << 10

# A unit is about this fraction of the whole, within these bounds: small enough that workers finish together and little is repeated after
# a crash, large enough that opening a database and syncing it (some 20 ms) do not show.
UNITS, UNIT_LEAST, UNIT_MOST = 64, 32 << 20, 1 << 30


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What the user chooses about a plan, besides model and layout.

    `dtype` is "source" or a dtype's name; `ends_equal` is what comparing a tied model's two embeddings gave, None if it was not done.
    """

    dtype: str
    mesh: MeshRules
    chunk_bytes: int
    memory_budget: int
    ignore: tuple[str, ...] = ()
    ends_equal: bool | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """One parameter's share of a leaf: where it is stored, where it goes, and which one of a template's leaves this is (`index`)."""

    param: str
    stored: str
    source: Address
    target: Address
    index: Mapping[str, int]
    rule: ValueRule


@dataclass(frozen=True, slots=True)
class Leaf:
    """One array of the target tree. `zeros` is the number of elements that no part fills; `template` names all leaves like it."""

    path: tuple[str, ...]
    template: str
    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]
    inner: tuple[int, ...]
    spec: Spec
    parts: tuple[Part, ...]
    exact: bool
    zeros: int

    @property
    def name(self) -> str:
        """The path as one dotted name."""
        return ".".join(self.path)

    @property
    def itemsize(self) -> int:
        """Bytes of an element in memory."""
        return dtype_named(self.dtype).numpy.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * self.itemsize

    @property
    def chunks(self) -> int:
        """The number of chunks of its grid."""
        return math.prod(grid_shape(self.shape, self.chunk))

    @property
    def peak_bytes(self) -> int:
        """What one worker holds while it makes the largest chunk."""
        widest = max(dtype_of_code(part.stored).numpy.itemsize for part in self.parts)
        return math.prod(self.chunk) * _held(self.itemsize, widest)


@dataclass(frozen=True, slots=True)
class Span:
    """Chunks [start, stop) of leaf number `leaf`, in row-major order of its grid."""

    leaf: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Unit:
    """Work that is done or not done: spans of whole chunks, with the bytes and requests it takes."""

    number: int
    spans: tuple[Span, ...]
    bytes_read: int
    bytes_written: int
    requests: int


@dataclass(frozen=True)
class Plan:
    """A whole conversion; `make_plan` makes it, `to_json` and `plan_from_json` carry it to workers."""

    source: Source
    family: str
    layout: str
    leaves: tuple[Leaf, ...]
    units: tuple[Unit, ...]
    mesh: MeshRules
    tied: bool
    metadata: Mapping[str, object]
    notes: tuple[str, ...] = field(default=())

    @property
    def target_bytes(self) -> int:
        """Bytes of all leaves."""
        return sum(leaf.nbytes for leaf in self.leaves)

    @property
    def bytes_read(self) -> int:
        """Bytes that the units will read."""
        return sum(unit.bytes_read for unit in self.units)

    @property
    def requests(self) -> int:
        """Read requests that the units will make."""
        return sum(unit.requests for unit in self.units)

    @property
    def peak_bytes(self) -> int:
        """The most that one worker holds, without the interpreter and the libraries."""
        return max(leaf.peak_bytes for leaf in self.leaves)

    def digest(self) -> str:
        """A hex digest of all that decides the checkpoint's bytes."""
        plain = replace(self, source=replace(self.source, root="", files={}, notes=()), notes=())
        text = self.source.fingerprint().encode() + _PLAN.dump_json(plain)
        return hashlib.blake2b(text, digest_size=16).hexdigest()

    def to_json(self) -> bytes:
        """The plan as JSON."""
        return _PLAN.dump_json(self)


_PLAN: TypeAdapter[Plan] = TypeAdapter(Plan)


def plan_from_json(text: bytes) -> Plan:
    """The plan that `Plan.to_json` wrote."""
    return _PLAN.validate_json(text)


def make_plan(source: Source, model: Model, layout: Layout, options: PlanOptions) -> Plan:
    """Plans the conversion of a source; raises InputError with all that is missing, unmapped, misshapen or undivided."""
    tied = is_tied(model, source.tensors, options.ends_equal)
    require_covered(model, source.tensors, tied, options.ignore)
    builder = _Builder(source.tensors, {**model.axes, **layout.axes}, model, options)
    params = {param.name: param for param in model.params if not (tied and param.name == TIED)}
    leaves = tuple(leaf for slot in layout.slots if slot.param in params for leaf in builder.leaves(slot, params[slot.param]))
    leaves = _merged(leaves)
    if builder.problems:
        raise InputError(f"the {layout.name} layout cannot hold this checkpoint", builder.problems)
    units = tuple(_units(leaves, source.tensors))
    notes = (*source.notes, *_tie_notes(model, source.tensors, tied, options.ends_equal), *layout.notes)
    return Plan(source, model.family.name, layout.name, leaves, units, options.mesh, tied, layout.metadata, notes)


@dataclass(frozen=True)
class _Builder:
    """Makes leaves of slots and collects what is wrong with them."""

    stored: Mapping[str, StoredTensor]
    axes: Axes
    model: Model
    options: PlanOptions
    problems: list[Problem] = field(default_factory=list)

    def leaves(self, slot: Slot, param: Param) -> Iterator[Leaf]:
        """The leaves of one slot: one, or one for each index in its name."""
        source = param.address(self.axes)
        target = address(slot.name, slot.dims, self.axes, slot.part)
        if source.sizes != target.sizes:
            raise ValueError(f"{slot.param}: [{param.key} {param.dims}] and [{slot.name} {slot.dims}] are not over the same axes")
        rule = ValueRule(
            self.model.facts[slot.scale] if slot.scale else 1.0, self.model.facts[slot.shift] if slot.shift else 0.0
        )
        codes = {key: self.stored[key].dtype for key, _ in source.keys()}
        spec = partition(target, self.options.mesh)
        self.problems.extend(misfits(slot.name, target, spec, self.options.mesh))
        plain = len(set(codes.values())) == 1
        for name, index in target.keys():
            used = set(codes.values()) if plain else {codes[key] for key, at in source.keys() if _agree(at, index)}
            part = Part(param.name, sorted(used)[0], source, target, index, rule)
            if (dtype := self._dtype(slot, name, used, part)) is not None:
                yield self._leaf(slot, name, part, dtype, spec)

    def _leaf(self, slot: Slot, name: str, part: Part, dtype: str, spec: Spec) -> Leaf:
        shape, memory = part.target.shape, dtype_named(dtype).numpy.itemsize
        stored = dtype_of_code(part.stored)
        limit = self.options.memory_budget // _held(memory, stored.numpy.itemsize) * memory
        chunk, inner = choose_chunk(
            shape,
            itemsize=memory,
            limit=min(self.options.chunk_bytes, limit),
            shards=shards(spec, self.options.mesh),
            order=cut_order(part.target, part.source),
        )
        exact = is_exact(part.rule, stored, dtype_named(dtype))
        zeros = math.prod(shape) - _filled(part.target)
        return Leaf(tuple(name.split(".")), slot.name, shape, dtype, chunk, inner, spec, (part,), exact, zeros)

    def _dtype(self, slot: Slot, name: str, codes: set[str], part: Part) -> str | None:
        """The dtype of a leaf, or None with a problem where its tensors do not agree on one."""
        floats = all(is_float(dtype_of_code(code)) for code in codes)
        wanted = slot.dtype or self.options.dtype
        if len(codes) > 1 and (wanted == "source" or not floats):
            fact = f"{name} is made of tensors of different dtypes: {', '.join(sorted(codes))}"
            self.problems.append(Problem(fact, 'set target.dtype to one of them, such as "float32"'))
            return None
        if not floats and not part.rule.moves:
            self.problems.append(Problem(f"{name} is {part.stored}, but the layout scales it", 'use target.layout = "flat"'))
            return None
        return dtype_of_code(part.stored).name if wanted == "source" or not floats else wanted


def _held(itemsize: int, stored: int) -> int:
    """Bytes that a worker holds for each element of a chunk; rows are converted in place, in the wider of the two dtypes."""
    return COPIES * itemsize + max(itemsize, stored)


def _agree(a: Mapping[str, int], b: Mapping[str, int]) -> bool:
    return all(b.get(axis, i) == i for axis, i in a.items())


def _filled(target: Address) -> int:
    return math.prod(digit.size for dim in target.dims for digit in dim)


def _merged(leaves: Iterable[Leaf]) -> tuple[Leaf, ...]:
    """Leaves of one path made one: the parts of a fused target lie side by side."""
    found: dict[tuple[str, ...], Leaf] = {}
    for leaf in leaves:
        if (other := found.get(leaf.path)) is not None:
            zeros = other.zeros - math.prod(leaf.shape) + leaf.zeros
            leaf = replace(other, parts=other.parts + leaf.parts, exact=other.exact and leaf.exact, zeros=zeros)
        found[leaf.path] = leaf
    return tuple(found.values())


def _units(leaves: Sequence[Leaf], stored: Mapping[str, StoredTensor]) -> Iterator[Unit]:
    """Cuts the chunks of all leaves, in order, into units of about equal size."""
    total = sum(leaf.nbytes for leaf in leaves)
    wanted = min(max(total // UNITS, UNIT_LEAST), UNIT_MOST)
    number, spans, cost = 0, [], _Cost()
    for place, leaf in enumerate(leaves):
        start, costs = 0, _ChunkCosts(leaf, stored)
        for chunk in range(leaf.chunks):
            cost = cost.plus(costs.of(chunk))
            if cost.written >= wanted:
                spans.append(Span(place, start, chunk + 1))
                yield Unit(number, tuple(spans), cost.read, cost.written, cost.requests)
                number, spans, cost, start = number + 1, [], _Cost(), chunk + 1
        if start < leaf.chunks:
            spans.append(Span(place, start, leaf.chunks))
    if spans:
        yield Unit(number, tuple(spans), cost.read, cost.written, cost.requests)


@dataclass(frozen=True, slots=True)
class _Cost:
    read: int = 0
    written: int = 0
    requests: int = 0

    def plus(self, other: "_Cost") -> "_Cost":
        return _Cost(self.read + other.read, self.written + other.written, self.requests + other.requests)


class _ChunkCosts:
    """What each chunk of a leaf costs; chunks that cut the digits alike cost the same, so few are worked out."""

    def __init__(self, leaf: Leaf, stored: Mapping[str, StoredTensor]) -> None:
        self._leaf, self._stored = leaf, stored
        self._known: dict[object, _Cost] = {}

    def of(self, chunk: int) -> _Cost:
        box = chunk_box(self._leaf.shape, self._leaf.chunk, chunk)
        like = tuple(_cut(part.target.dims, box) for part in self._leaf.parts)
        if like not in self._known:
            self._known[like] = self._work_out(box)
        return self._known[like]

    def _work_out(self, box: Box) -> _Cost:
        read = requests = 0
        for _, piece in leaf_pieces(self._leaf, box):
            tensor = self._stored[piece.key]
            runs = byte_runs(tensor.shape, piece.box, bits=dtype_of_code(tensor.dtype).bits)
            for group in coalesce(runs, gap=READ_GAP, most=RUNS_PER_REQUEST):
                read, requests = read + sum(group[-1]) - group[0][0], requests + 1
        return _Cost(read, math.prod(box_shape(box)) * self._leaf.itemsize, requests)


def _cut(dims: Sequence[Dim], box: Box) -> tuple[tuple[int, int], ...]:
    """What a box's cost depends on: its sides, and where they start among the inner digits, or among the parts of a sum."""
    cuts = []
    for dim, (start, stop) in zip(dims, box, strict=True):
        inner = math.prod(digit.radix for digit in dim[1:])
        roomy = any(digit.size < digit.radix for digit in dim)
        cuts.append((stop - start, start if roomy else start % inner))
    return tuple(cuts)


def _tie_notes(model: Model, stored: Mapping[str, StoredTensor], tied: bool, equal: bool | None) -> Iterator[str]:
    key = next((param.key for param in model.params if param.name == TIED), "")
    if tied and key not in stored:
        yield f"{key} is not in the checkpoint and config.json says tied: the model uses the embedding, no output projection is written"
    elif tied and equal is None:
        yield f"{key} is in the checkpoint and config.json says tied: run compares it with the embedding and writes it only if it differs"
    elif tied:
        yield f"{key} equals the embedding: tied, no output projection is written"
    elif equal is False and key in stored:
        yield f"{key} differs from the embedding although config.json says tied: it is written, and the model is not tied"


def leaf_pieces(leaf: Leaf, box: Box) -> Iterator[tuple[Part, Piece]]:
    """Every piece of a box of a leaf, with the part it belongs to."""
    for part in leaf.parts:
        for piece in pieces(part.target, part.source, part.index, box):
            yield part, piece
