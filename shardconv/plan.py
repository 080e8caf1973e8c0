"""The plan: all that a conversion will do, as frozen values, from headers alone.

The *leaves* of the target tree are made from the tables of family and layout, cut into chunks, and the chunks dealt out to *units* of work.
Everything a worker needs is in here (`to_json`), nothing is decided later, and nothing is read but headers, so it takes seconds for any
model.

Memory: a worker's buffers grow to the largest they have held: the source rows of a piece, the chunk being filled, the chunk before it,
which is being written, and what the store holds of that while it encodes it. `Plan.peak_bytes` is the sum of these, and no chunk is
larger than lets it stay under the budget.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pydantic import TypeAdapter

from shardconv.axes import Address, Axes, Dim, address, encode
from shardconv.boxes import Interval
from shardconv.chunks import choose_chunk, cut_order
from shardconv.coverage import TIED, is_tied, require_covered
from shardconv.dtypes import dtype_named, dtype_of_code
from shardconv.errors import ConfigError, InputError, Problem
from shardconv.family import Layout, Model, Param, Slot
from shardconv.formats import StoredTensor
from shardconv.leaf import CHUNKS as CHUNKS
from shardconv.leaf import Leaf as Leaf
from shardconv.leaf import Part as Part
from shardconv.leaf import leaf_pieces as leaf_pieces
from shardconv.placement import Window, chunk_in_shard, cut_windows, memory, mesh_units, resident
from shardconv.sharding import MeshRules, Misfit, Spec, misfits, partition, shards, yielded
from shardconv.source import Source
from shardconv.units import READ_GAP as READ_GAP
from shardconv.units import Span as Span
from shardconv.units import Unit as Unit
from shardconv.units import cut_units
from shardconv.values import ValueRule, is_exact, is_float

# The least that a memory budget must allow a chunk, in bytes: a smaller one takes longer to name, hash and index than to write.
LEAST = 64 << 10

ONE_DTYPE = 'set target.dtype to one dtype, such as "float32"'

@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What the user chooses about a plan, besides model and layout.

    `dtype` is "source" or a dtype's name, `store_copies` how many copies of a chunk the store makes while it encodes it; `ends_equal` is
    what comparing a tied model's two embeddings gave, None if it was not done. `processes` share the mesh where the arrays are placed on it
    and written from there (`placement`); 0 for a conversion that streams from file to file.
    """

    dtype: str
    mesh: MeshRules
    chunk_bytes: int
    memory_budget: int
    ignore: tuple[str, ...] = ()
    ends_equal: bool | None = None
    store_copies: int = 1
    processes: int = 0


@dataclass(frozen=True)
class Plan:
    """A whole conversion; `make_plan` makes it, `to_json` and `plan_from_json` carry it to workers.

    `windows` say which leaves are on the mesh together, and `processes` how many share it; none and 0 where nothing is placed on it.
    """

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
    windows: tuple[Window, ...] = ()
    processes: int = 0

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
        if self.windows:
            windows = (self.leaves[window.start : window.stop] for window in self.windows)
            return max(memory(leaves, self.mesh, self.processes, self.store_copies) for leaves in windows)
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

    Raises InputError with all that is missing, unmapped or misshapen, ConfigError for a mesh that does not divide the arrays or a memory
    budget that fits no chunk.
    """
    tied = is_tied(model, source.tensors, options.ends_equal)
    ignored = require_covered(model, source.tensors, tied, options.ignore)
    builder = _Builder(source.tensors, {**model.axes, **layout.axes}, model, options)
    params = {param.name: param for param in model.params if not (tied and param.name == TIED)}
    leaves = builder.merged(
        leaf for slot in layout.slots if slot.param in params for leaf in builder.leaves(slot, params[slot.param])
    )
    homeless = sorted(params.keys() - {slot.param for slot in layout.slots})
    builder.problems.extend(Problem(f"{param} has no place in it", 'use target.layout = "flat"') for param in homeless)
    undivided = [misfit.problem(names, options.mesh) for misfit, names in builder.misfits.items()]
    if builder.problems:
        raise InputError(f"the {layout.name} layout cannot hold this checkpoint", builder.problems + undivided)
    if undivided:
        raise ConfigError("the mesh does not divide the arrays", undivided)
    limit = _limit(leaves, options)
    leaves = tuple(_chunked(leaf, limit, options) for leaf in leaves)
    windows, units = _cut(leaves, source.tensors, options)
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
        notes=(*source.notes, *_other_model(model), *ignored, *ends, *layout.notes, *_mesh_notes(builder.yielded)),
        store_copies=options.store_copies,
        windows=windows,
        processes=options.processes,
    )


@dataclass(frozen=True)
class _Builder:
    """Makes leaves of slots, each of one chunk yet, and collects what is wrong with them."""

    stored: Mapping[str, StoredTensor]
    axes: Axes
    model: Model
    options: PlanOptions
    problems: list[Problem] = field(default_factory=list)
    misfits: dict[Misfit, set[str]] = field(default_factory=dict)
    yielded: dict[tuple[str, str, str], set[str]] = field(default_factory=dict)

    def leaves(self, slot: Slot, param: Param) -> Iterator[Leaf]:
        """The leaves of one slot: one, or one for each index in its name."""
        source = param.address(self.axes)
        target = address(slot.name, slot.dims, self.axes, slot.part)
        if source.sizes != target.sizes:
            raise ValueError(f"{slot.param}: [{param.key} {param.dims}] and [{slot.name} {slot.dims}] are not over the same axes")
        facts = self.model.facts
        rule = ValueRule(facts[slot.scale] if slot.scale else 1.0, facts[slot.shift] if slot.shift else 0.0)
        spec = partition(target, self.axes, self.options.mesh)
        self._split(target)
        codes = {key: self.stored[key].dtype for key, _ in source.keys()}
        plain = len(set(codes.values())) == 1
        wrong: dict[Problem, list[str]] = {}
        for name, index in target.keys():
            used = set(codes.values()) if plain else {codes[key] for key, at in source.keys() if _agree(at, index)}
            part = Part(param.name, tuple(sorted(used)), source, target, index, rule)
            if problem := _disagreement(part, slot.dtype or self.options.dtype):
                wrong.setdefault(problem, []).append(name)
            else:
                yield _whole_leaf(slot, name, part, _dtype(part, slot.dtype or self.options.dtype), spec)
        for problem, names in wrong.items():
            said = names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
            self.problems.append(Problem(f"{said} {problem.fact}", problem.remedy))

    def _split(self, target: Address) -> None:
        """Collect what the mesh rules do not do as they are written, with the arrays in which."""
        names = [name for name, _ in target.keys()]
        for misfit in misfits(target, self.axes, self.options.mesh):
            self.misfits.setdefault(misfit, set()).update(names)
        for rule in yielded(target, self.axes, self.options.mesh):
            self.yielded.setdefault(rule, set()).update(names)

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
            if leaf.shape != other.shape or not all(_apart(part.target, leaf.parts[0].target) for part in other.parts):
                raise ValueError(f"{leaf.name}: the parts {other.parts[0].param} and {leaf.parts[0].param} do not lie side by side")
            zeros = other.zeros - math.prod(leaf.shape) + leaf.zeros
            parts = other.parts + leaf.parts
            found[leaf.path] = replace(other, parts=parts, exact=other.exact and leaf.exact, zeros=zeros)
        return tuple(found.values())


def _whole_leaf(slot: Slot, name: str, part: Part, dtype: str, spec: Spec) -> Leaf:
    """A leaf of one chunk."""
    shape = part.target.shape
    exact = all(is_exact(part.rule, dtype_of_code(code), dtype_named(dtype)) for code in part.dtypes)
    zeros = math.prod(shape) - math.prod(digit.size for dim in part.target.dims for digit in dim)
    return Leaf(tuple(name.split(".")), slot.name, shape, dtype, shape, shape, spec, (part,), exact, zeros)


def _apart(a: Address, b: Address) -> bool:
    """Whether the elements of two addresses of one shape lie apart, side by side along some dim."""
    sides = ((_filled(one), _filled(other)) for one, other in zip(a.dims, b.dims, strict=True))
    return any(one[1] <= other[0] or other[1] <= one[0] for one, other in sides)


def _filled(dim: Dim) -> Interval:
    """The part of a dim that its address fills: room is left by the outermost digit alone."""
    first = {digit.axis: 0 for digit in dim}
    last = {digit.axis: digit.size - 1 for digit in dim}
    return encode(dim, first), encode(dim, last) + 1


def _floats(part: Part) -> bool:
    return all(is_float(dtype_of_code(code)) for code in part.dtypes)


def _dtype(part: Part, wanted: str) -> str:
    """The dtype of a leaf: as wanted for floats, as it is for anything else."""
    return dtype_of_code(part.dtypes[0]).name if wanted == "source" or not _floats(part) else wanted


def _disagreement(part: Part, wanted: str) -> Problem | None:
    """Why a part has no dtype, if it has none."""
    if len(part.dtypes) > 1 and (wanted == "source" or not _floats(part)):
        return Problem(f"is made of tensors of different dtypes: {part.stored}", ONE_DTYPE)
    if not part.rule.moves and not _floats(part):
        return Problem(f"is {part.stored}, and the layout scales it", 'use target.layout = "flat"')
    return None


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


def _cut(
    leaves: Sequence[Leaf], stored: Mapping[str, StoredTensor], options: PlanOptions
) -> tuple[tuple[Window, ...], tuple[Unit, ...]]:
    """The windows and the units; raises ConfigError where a process cannot hold its part of an array."""
    if not options.processes:
        return (), tuple(cut_units(leaves, stored))
    mesh, processes, copies, budget = options.mesh, options.processes, options.store_copies, options.memory_budget
    most = max(leaves, key=lambda leaf: memory([leaf], mesh, processes, copies))
    held = memory([most], mesh, processes, copies)
    if held > budget:
        fact = (
            f"{most.name}: each of {processes} processes has {resident(most, mesh, processes)} bytes of it, which take {held} "
            f"while they are placed, and a process may take {budget}"
        )
        remedy = (
            f'set workers.memory_budget = "{-(-held >> 20)}MiB" or more, split it further in mesh.rules, '
            "or use target.scan_layers = false"
        )
        raise ConfigError("the memory budget is too small for the mesh", [Problem(fact, remedy)])
    return mesh_units(leaves, mesh, cut_windows(leaves, mesh, processes, budget, copies))


def _chunked(leaf: Leaf, limit: int, options: PlanOptions) -> Leaf:
    part, mesh = leaf.parts[0], options.mesh
    order = cut_order(part.target, part.source)
    if options.processes:
        return chunk_in_shard(leaf, limit, mesh, order)
    chunk, inner = choose_chunk(
        leaf.shape, itemsize=leaf.itemsize, limit=limit, shards=shards(leaf.spec, mesh), order=order
    )
    return replace(leaf, chunk=chunk, inner=inner)


def _agree(a: Mapping[str, int], b: Mapping[str, int]) -> bool:
    return all(b.get(axis, i) == i for axis, i in a.items())


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
        yield f"{advice}, unless run finds the two different" if key in stored and equal is None else advice


def _other_model(model: Model) -> Iterator[str]:
    """That model.family was set to a family of other models."""
    said, known = model.config.get("architectures"), model.family.architectures
    if isinstance(said, list) and said and known and not set(map(str, said)) & set(known):
        names = ", ".join(map(str, said))
        yield f"config.json's architectures are {names}, and model.family = \"{model.family.name}\" is for {', '.join(known)}"


def _mesh_notes(yielded: Mapping[tuple[str, str, str], set[str]]) -> Iterator[str]:
    for (axis, entry, owner), names in yielded.items():
        places = f"{len(names)} arrays" if len(names) > 1 else next(iter(names))
        yield f"mesh.rules.{axis} does not apply in {places}: mesh.rules.{owner} comes before it and has {entry} there"
