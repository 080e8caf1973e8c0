"""The plan: all that a conversion will do, as frozen values, from headers alone.

A *leaf* is one array of the target tree, made of *parts*: parameters, each with the address it comes from and the address it goes to. A
leaf is cut into chunks; a *unit* is the resumable, repeatable piece of work, a run of whole chunks that no other unit touches. Everything
a worker needs is in here (`to_json`), nothing is decided later, and nothing is read but headers, so it takes seconds for any model.

Memory: a worker's buffers grow to the largest they have held: the source rows of a piece, the chunk being filled, the chunk before it,
which is being written, and what the store holds of that while it encodes it. `Plan.peak_bytes` is the sum of these, and no chunk is
larger than lets it stay under the budget.
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
from shardconv.errors import ConfigError, InputError, Problem
from shardconv.family import Layout, Model, Param, Slot
from shardconv.formats import StoredTensor
from shardconv.route import Piece, pieces
from shardconv.runs import RUNS_PER_REQUEST, byte_runs, coalesce
from shardconv.sharding import MeshRules, Spec, misfits, partition, shards
from shardconv.source import Source
from shardconv.values import ValueRule, is_exact, is_float

# Chunks that a worker holds, besides what the store holds: the one being filled and the one being written.
CHUNKS = 2

# The least that a memory budget must allow a chunk, in bytes: a smaller one takes longer to name, hash and index than to write.
LEAST = 64 << 10

ONE_DTYPE = 'set target.dtype to one dtype, such as "float32"'

# Bytes between two runs of a box that are read, and thrown away, to save a request: about what a request to a local disk costs.
READ_GAP = 64 << 10

# A unit is about this fraction of the whole, within these bounds: small enough that workers finish together and little is repeated after
# a crash, large enough that opening a database and syncing it (some 20 ms) do not show.
UNITS, UNIT_LEAST, UNIT_MOST = 64, 32 << 20, 1 << 30


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What the user chooses about a plan, besides model and layout.

    `dtype` is "source" or a dtype's name, `store_copies` how many copies of a chunk the store makes while it encodes it; `ends_equal` is
    what comparing a tied model's two embeddings gave, None if it was not done.
    """

    dtype: str
    mesh: MeshRules
    chunk_bytes: int
    memory_budget: int
    ignore: tuple[str, ...] = ()
    ends_equal: bool | None = None
    store_copies: int = 1


@dataclass(frozen=True, slots=True)
class Part:
    """One parameter's share of a leaf: where it is stored, where it goes, and which one of a template's leaves this is (`index`).

    `dtypes` are the codes of its tensors, sorted; most often one.
    """

    param: str
    dtypes: tuple[str, ...]
    source: Address
    target: Address
    index: Mapping[str, int]
    rule: ValueRule

    @property
    def stored(self) -> str:
        """Its tensors' dtypes as text.

        >>> Part("q", ("BF16", "F32"), address("q", "", {}), address("q", "", {}), {}, ValueRule()).stored
        'BF16, F32'
        """
        return ", ".join(self.dtypes)


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
    def rows_ratio(self) -> int:
        """Bytes of source rows that a worker may hold for a byte of a chunk: rows are converted in place, in the wider of two dtypes."""
        widest = max(dtype_of_code(code).numpy.itemsize for part in self.parts for code in part.dtypes)
        return max(widest // self.itemsize, 1)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of the largest chunk."""
        return math.prod(self.chunk) * self.itemsize

    @property
    def peak_bytes(self) -> int:
        """What one worker's buffers hold for this leaf; the store's copies come on top."""
        return self.chunk_bytes * (CHUNKS + self.rows_ratio)


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
    notes: tuple[str, ...]
    store_copies: int

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
        """The most that one worker's buffers hold; the interpreter, the libraries and some fixed buffers (about 10 MB) come on top."""
        chunks = (CHUNKS + self.store_copies) * max(leaf.chunk_bytes for leaf in self.leaves)
        return chunks + max(leaf.chunk_bytes * leaf.rows_ratio for leaf in self.leaves)

    def digest(self) -> str:
        """A hex digest of all that decides the checkpoint's bytes: a copy of the source elsewhere gives the same."""
        plain = replace(self, source=replace(self.source, root="", files={}, config=None, notes=()), notes=(), store_copies=0)
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
    """Plans the conversion of a source.

    Raises InputError with all that is missing, unmapped, misshapen or undivided, ConfigError for a memory budget that fits no chunk.
    """
    tied = is_tied(model, source.tensors, options.ends_equal)
    ignored = require_covered(model, source.tensors, tied, options.ignore)
    builder = _Builder(source.tensors, {**model.axes, **layout.axes}, model, options)
    params = {param.name: param for param in model.params if not (tied and param.name == TIED)}
    leaves = builder.merged(
        leaf for slot in layout.slots if slot.param in params for leaf in builder.leaves(slot, params[slot.param])
    )
    if builder.problems:
        raise InputError(f"the {layout.name} layout cannot hold this checkpoint", builder.problems)
    limit = _limit(leaves, options)
    leaves = tuple(_chunked(leaf, limit, options.mesh) for leaf in leaves)
    units = tuple(_units(leaves, source.tensors))
    ends = _tie_notes(model, source.tensors, tied, options.ends_equal, layout.when_tied)
    return Plan(
        source=source,
        family=model.family.name,
        layout=layout.name,
        leaves=leaves,
        units=units,
        mesh=options.mesh,
        tied=tied,
        metadata=layout.metadata,
        notes=(*source.notes, *ignored, *ends, *layout.notes),
        store_copies=options.store_copies,
    )


@dataclass(frozen=True)
class _Builder:
    """Makes leaves of slots, each of one chunk yet, and collects what is wrong with them."""

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
        facts = self.model.facts
        rule = ValueRule(facts[slot.scale] if slot.scale else 1.0, facts[slot.shift] if slot.shift else 0.0)
        spec = partition(target, self.axes, self.options.mesh)
        self.problems.extend(misfits(slot.name, target, self.axes, self.options.mesh))
        codes = {key: self.stored[key].dtype for key, _ in source.keys()}
        plain = len(set(codes.values())) == 1
        wrong: dict[str, list[str]] = {}
        for name, index in target.keys():
            used = set(codes.values()) if plain else {codes[key] for key, at in source.keys() if _agree(at, index)}
            part = Part(param.name, tuple(sorted(used)), source, target, index, rule)
            if fact := _disagreement(part, slot.dtype or self.options.dtype):
                wrong.setdefault(fact, []).append(name)
            else:
                yield _whole_leaf(slot, name, part, _dtype(part, slot.dtype or self.options.dtype), spec)
        for fact, names in wrong.items():
            said = names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
            self.problems.append(Problem(f"{said} {fact}", _remedy(part)))

    def merged(self, leaves: Iterable[Leaf]) -> tuple[Leaf, ...]:
        """Leaves of one path made one: the parts of a fused target lie side by side."""
        found: dict[tuple[str, ...], Leaf] = {}
        for leaf in leaves:
            other = found.setdefault(leaf.path, leaf)
            if other is leaf:
                continue
            if leaf.dtype != other.dtype:
                fact = f"{leaf.name} is made of {other.parts[0].param} in {other.dtype} and {leaf.parts[0].param} in {leaf.dtype}"
                self.problems.append(Problem(fact, ONE_DTYPE))
            zeros = other.zeros - math.prod(leaf.shape) + leaf.zeros
            if leaf.shape != other.shape or zeros < 0:
                raise ValueError(f"{leaf.name}: the parts {other.parts[0].param} and {leaf.parts[0].param} do not lie side by side")
            parts = other.parts + leaf.parts
            found[leaf.path] = replace(other, parts=parts, exact=other.exact and leaf.exact, zeros=zeros)
        return tuple(found.values())


def _whole_leaf(slot: Slot, name: str, part: Part, dtype: str, spec: Spec) -> Leaf:
    """A leaf of one chunk."""
    shape = part.target.shape
    exact = all(is_exact(part.rule, dtype_of_code(code), dtype_named(dtype)) for code in part.dtypes)
    zeros = math.prod(shape) - math.prod(digit.size for dim in part.target.dims for digit in dim)
    return Leaf(tuple(name.split(".")), slot.name, shape, dtype, shape, shape, spec, (part,), exact, zeros)


def _floats(part: Part) -> bool:
    return all(is_float(dtype_of_code(code)) for code in part.dtypes)


def _dtype(part: Part, wanted: str) -> str:
    """The dtype of a leaf: as wanted for floats, as it is for anything else."""
    return dtype_of_code(part.dtypes[0]).name if wanted == "source" or not _floats(part) else wanted


def _disagreement(part: Part, wanted: str) -> str:
    """Why a part has no dtype, or nothing."""
    if len(part.dtypes) > 1 and (wanted == "source" or not _floats(part)):
        return f"is made of tensors of different dtypes: {part.stored}"
    return "" if part.rule.moves or _floats(part) else f"is {part.stored}, and the layout scales it"


def _remedy(part: Part) -> str:
    return ONE_DTYPE if len(part.dtypes) > 1 else 'use target.layout = "flat"'


def _limit(leaves: Sequence[Leaf], options: PlanOptions) -> int:
    """The most bytes of a chunk; raises ConfigError where the memory budget does not fit the least that is sensible."""
    held = CHUNKS + options.store_copies + max(leaf.rows_ratio for leaf in leaves)
    most = options.memory_budget // held
    largest = max(leaves, key=lambda leaf: leaf.nbytes)
    least = min(LEAST, options.chunk_bytes, largest.nbytes)
    if most < least:
        fact = (
            f"{largest.name}: a chunk of {least} bytes takes {least * held} bytes of memory, "
            f"and a worker may take {options.memory_budget}"
        )
        remedy = f'set workers.memory_budget = "{-(-least * held >> 10)}KiB" or more'
        raise ConfigError("the memory budget is too small", [Problem(fact, remedy)])
    return min(options.chunk_bytes, most)


def _chunked(leaf: Leaf, limit: int, mesh: MeshRules) -> Leaf:
    part = leaf.parts[0]
    order = cut_order(part.target, part.source)
    chunk, inner = choose_chunk(
        leaf.shape, itemsize=leaf.itemsize, limit=limit, shards=shards(leaf.spec, mesh), order=order
    )
    return replace(leaf, chunk=chunk, inner=inner)


def _agree(a: Mapping[str, int], b: Mapping[str, int]) -> bool:
    return all(b.get(axis, i) == i for axis, i in a.items())


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
    """What each chunk of a leaf costs; chunks that cut the digits of tensors of one dtype alike cost the same, so few are worked out."""

    def __init__(self, leaf: Leaf, stored: Mapping[str, StoredTensor]) -> None:
        self._leaf, self._stored = leaf, stored
        self._known: dict[object, _Cost] = {}
        self._mixed = any(len(part.dtypes) > 1 for part in leaf.parts)

    def of(self, chunk: int) -> _Cost:
        box = chunk_box(self._leaf.shape, self._leaf.chunk, chunk)
        like = box if self._mixed else tuple(_cut(part.target.dims, box) for part in self._leaf.parts)
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


def _tie_notes(
    model: Model, stored: Mapping[str, StoredTensor], tied: bool, equal: bool | None, advice: str
) -> Iterator[str]:
    key = next((param.key for param in model.params if param.name == TIED), "")
    if tied and key not in stored:
        yield f"{key} is not in the checkpoint and config.json says tied: the model uses the embedding, no output projection is written"
    elif tied and equal is None:
        yield f"{key} is in the checkpoint and config.json says tied: run compares it with the embedding and writes it only if it differs"
    elif tied:
        yield f"{key} equals the embedding: tied, no output projection is written"
    elif model.says_tied and key in stored:
        yield f"{key} differs from the embedding although config.json says tied: it is written, and the model is not tied"
    if tied and advice:
        yield advice


def leaf_pieces(leaf: Leaf, box: Box) -> Iterator[tuple[Part, Piece]]:
    """Every piece of a box of a leaf, with the part it belongs to."""
    for part in leaf.parts:
        for piece in pieces(part.target, part.source, part.index, box):
            yield part, piece
