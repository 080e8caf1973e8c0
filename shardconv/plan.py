"""The plan: all that a conversion will do, as frozen values, from headers alone.

The *leaves* of the target tree are made from the tables of family and layout, cut into chunks, and the chunks dealt out to *units* of work.
Everything a worker needs is in here (`to_json`), nothing is decided later, and nothing is read but headers, so it takes seconds for any
model.

Memory: a worker's buffers grow to the largest they have held: the source rows of a piece, the chunk being filled, the chunk before it,
which is being written, and what the store holds of that while it encodes it. `Plan.peak_bytes` is the sum of these, and no chunk is
larger than lets it stay under the budget.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from pydantic import TypeAdapter

from shardconv.axes import Axes, address
from shardconv.chunks import choose_chunk, cut_order
from shardconv.coverage import TIED, is_tied, require_covered
from shardconv.errors import ConfigError, InputError, Problem
from shardconv.family import Layout, Model, Param, Slot
from shardconv.formats import ComputedTensor, StoredTensor, Tensor
from shardconv.leaf import CHUNKS as CHUNKS
from shardconv.leaf import Leaf as Leaf
from shardconv.leaf import Part as Part
from shardconv.leaf import leaf_pieces as leaf_pieces
from shardconv.placement import Window, chunk_in_shard, cut_windows, memory, mesh_units, resident
from shardconv.sharding import MeshRules, shards
from shardconv.source import Source
from shardconv.transfers import FLAT, Builder, Transfer
from shardconv.units import READ_GAP as READ_GAP
from shardconv.units import Span as Span
from shardconv.units import Unit as Unit
from shardconv.units import cut_units
from shardconv.values import ValueRule

# The least that a memory budget must allow a chunk, in bytes: a smaller one takes longer to name, hash and index than to write.
LEAST = 64 << 10


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
    `computed` are the tensors that no file has, by name; `family` is "" where the user's own mapping is in the place of one.
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
    computed: Mapping[str, ComputedTensor] = field(default_factory=dict)

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """What leaves are made of: the source's tensors, and those that are computed."""
        return {**self.source.tensors, **self.computed} if self.computed else self.source.tensors

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
            placed = max(memory(leaves, self.mesh, self.processes, self.store_copies) for leaves in windows)
            return placed + computed_bytes(self.computed)
        chunks = (CHUNKS + self.store_copies) * max(leaf.chunk_bytes for leaf in self.leaves)
        return chunks + max(leaf.chunk_bytes * leaf.rows_ratio for leaf in self.leaves) + computed_bytes(self.computed)

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
    axes = {**model.axes, **layout.axes}
    params = {param.name: param for param in model.params if not (tied and param.name == TIED)}
    transfers = [_transfer(slot, params[slot.param], model, axes, options) for slot in layout.slots if slot.param in params]
    homeless = sorted(params.keys() - {slot.param for slot in layout.slots})
    ends = _tie_notes(model, source.tensors, tied, options.ends_equal, layout.when_tied)
    plan = plan_transfers(source, transfers, layout.name, options, [Problem(f"{one} has no place in it", FLAT) for one in homeless])
    notes = (*source.notes, *_other_model(model), *ignored, *ends, *layout.notes, *plan.notes)
    return replace(plan, family=model.family.name, tied=tied, metadata=layout.metadata, notes=notes)


def plan_transfers(
    source: Source,
    transfers: Sequence[Transfer],
    layout: str,
    options: PlanOptions,
    problems: Sequence[Problem] = (),
    computed: Mapping[str, ComputedTensor] | None = None,
) -> Plan:
    """Plans what fills the arrays of a layout, of no family, with notes on the mesh alone.

    Raises InputError with `problems` and all that is wrong with the arrays, ConfigError for a mesh that does not divide them or a memory
    budget that fits no chunk.
    """
    computed = computed or {}
    builder = Builder({**source.tensors, **computed}, options.mesh, list(problems))
    leaves = builder.merged(leaf for transfer in transfers for leaf in builder.leaves(transfer))
    undivided = [misfit.problem(names, options.mesh) for misfit, names in builder.misfits.items()]
    if builder.problems:
        raise InputError(f"the {layout} layout cannot hold this checkpoint", builder.problems + undivided)
    if undivided:
        raise ConfigError("the mesh does not divide the arrays", undivided)
    limit = _limit(leaves, options, computed_bytes(computed))
    leaves = tuple(_chunked(leaf, limit, options) for leaf in leaves)
    windows, units = _cut(leaves, builder.stored, options, computed_bytes(computed))
    return Plan(
        source=source,
        family="",
        layout=layout,
        leaves=leaves,
        units=units,
        mesh=options.mesh,
        tied=False,
        metadata={},
        notes=tuple(_mesh_notes(builder.yielded)),
        store_copies=options.store_copies,
        windows=windows,
        processes=options.processes,
        computed=computed,
    )


def computed_bytes(computed: Mapping[str, ComputedTensor]) -> int:
    """The most that a worker holds of computed tensors: it makes one at a time."""
    return max((tensor.peak_bytes for tensor in computed.values()), default=0)


def _transfer(slot: Slot, param: Param, model: Model, axes: Axes, options: PlanOptions) -> Transfer:
    """A parameter from where its family has it to where the layout wants it."""
    source, target = param.address(axes), address(slot.name, slot.dims, axes, slot.part)
    if source.sizes != target.sizes:
        raise ValueError(f"{slot.param}: [{param.key} {param.dims}] and [{slot.name} {slot.dims}] are not over the same axes")
    scale, shift = model.facts[slot.scale] if slot.scale else 1.0, model.facts[slot.shift] if slot.shift else 0.0
    return Transfer(param.name, source, target, slot.name, axes, slot.dtype or options.dtype, ValueRule(scale, shift))


def _limit(leaves: Sequence[Leaf], options: PlanOptions, computed: int) -> int:
    """The most bytes of a chunk; raises ConfigError where the memory budget does not fit the least that is sensible."""
    held = CHUNKS + options.store_copies + max(leaf.rows_ratio for leaf in leaves)
    most = (options.memory_budget - computed) // held
    largest = max(leaves, key=lambda leaf: leaf.nbytes)
    least = min(LEAST, options.chunk_bytes, largest.nbytes)
    if most < least:
        needed = least * held + computed
        fact = f"{largest.name}: a chunk of {least} bytes takes {needed} bytes of memory"
        fact += f", with {computed} for tensors that are computed," if computed else ","
        fact += f" and a worker may take {options.memory_budget}"
        remedy = f'set workers.memory_budget = "{-(-needed >> 10)}KiB" or more'
        raise ConfigError("the memory budget is too small", [Problem(fact, remedy)])
    return min(options.chunk_bytes, most)


def _cut(
    leaves: Sequence[Leaf], stored: Mapping[str, Tensor], options: PlanOptions, computed: int
) -> tuple[tuple[Window, ...], tuple[Unit, ...]]:
    """The windows and the units; raises ConfigError where a process cannot hold its part of an array."""
    if not options.processes:
        return (), tuple(cut_units(leaves, stored))
    mesh, processes, copies, budget = options.mesh, options.processes, options.store_copies, options.memory_budget - computed
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
