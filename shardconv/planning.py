"""From a config to a plan: open the source, find the family, bind it, lay it out, plan. Headers only."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches

from shardconv.budget import default_budget, this_machine
from shardconv.config import Config
from shardconv.config_sections import OutputSection
from shardconv.coverage import TIED, is_tied
from shardconv.errors import ConfigError, InputError, Problem
from shardconv.families import families, find
from shardconv.family import LayoutOptions, Model, bind
from shardconv.layouts import LAYOUTS
from shardconv.plan import Plan, PlanOptions, make_plan
from shardconv.porting.making import Asked, is_own, made_elsewhere
from shardconv.porting.planned import named_axes, plan_made
from shardconv.sharding import MeshRules
from shardconv.source import Source, open_source
from shardconv.ties import same_bytes


def plan_from_config(config: Config, *, compare_ends: bool = False) -> Plan:
    """Plans a conversion; raises InputError with all that is wrong, ConfigError where the config does not fit the model.

    `compare_ends` reads the embedding and the output projection where config.json calls them tied and both are there; without it
    nothing but headers is read, and they are taken as equal. A layout of the user's own is asked for its model, in another process.
    """
    source = open_source(config.source.path, config.source.prefix or "")
    if is_own(config.target.layout):
        return _own_plan(config, source)
    if source.config is None:
        fact = f"{source.root} has no config.json"
        raise InputError("the model's numbers are not known", [Problem(fact, "put the checkpoint's config.json beside its weights")])
    if config.target.layout not in LAYOUTS:
        fact = f"target.layout is {config.target.layout!r}"
        raise InputError("there is no such layout", [Problem(fact, f"known: {', '.join(LAYOUTS)}, and your own models as module:function")])
    target = config.target
    model = bind(find(source.config, config.model.family), source.config)
    chosen = LayoutOptions(target.scan_layers, target.rope, target.vocab_size or 0, target.query_dtype or "")
    layout = LAYOUTS[target.layout](model, chosen)
    _require_axes(config, {*model.axes, *layout.axes})
    return make_plan(source, model, layout, _options(config, _ends_equal(source, model) if compare_ends else None))


def _own_plan(config: Config, source: Source) -> Plan:
    target, ignore = config.target, config.model.ignore
    made = made_elsewhere(Asked(target.layout, source, target.mapping, ignore))
    plan = plan_made(source, made, target.layout, _options(config, None))
    _require_own_axes(config, named_axes(plan))
    return plan


def _options(config: Config, ends_equal: bool | None) -> PlanOptions:
    return PlanOptions(
        dtype=config.target.dtype,
        mesh=MeshRules(config.mesh.axes, config.mesh.rules),
        chunk_bytes=config.output.chunk_bytes,
        memory_budget=worker_budget(config),
        ignore=config.model.ignore,
        ends_equal=ends_equal,
        store_copies=_store_copies(config.output),
        processes=config.mesh.processes if config.mesh.places else 0,
    )


def _require_own_axes(config: Config, own: set[str]) -> None:
    """Raises ConfigError where mesh rules name an axis that the user's model has not: its rules are written for it alone."""
    close = {axis: get_close_matches(axis, own, n=1) for axis in config.mesh.rules if axis not in own}
    remedy = f"its axes, as the mapping or the layer rules name them, are {', '.join(sorted(own))}"
    problems = [
        Problem(f"mesh.rules.{axis}: no array of {config.target.layout} has such an axis", _meant(close[axis]) + remedy) for axis in close
    ]
    if problems:
        raise ConfigError("the mesh rules do not fit the model", problems)


def _meant(close: Sequence[str]) -> str:
    return f'did you mean "{close[0]}"? ' if close else ""


def _require_axes(config: Config, own: set[str]) -> None:
    """Raises ConfigError where mesh rules name an axis that no model has; one that only other models have is no mistake."""
    known = own.union(*(family.axes for family in families().values()))
    unknown = [axis for axis in config.mesh.rules if axis not in known]
    close = {axis: get_close_matches(axis, known, n=1) for axis in unknown}
    if unknown:
        problems = [
            Problem(
                f"mesh.rules.{axis} names no axis of a model",
                _meant(close[axis]) + f"this one has {', '.join(sorted(own))}",
            )
            for axis in unknown
        ]
        raise ConfigError("the mesh rules do not fit the model", problems)


def _store_copies(output: OutputSection) -> int:
    """Copies of a chunk that a store holds while it encodes it: at most one in ours, three in TensorStore's; see `sinks.chunk_writer`."""
    ours = output.zarr == 3 and output.ocdbt and output.compression == "none" and sys.byteorder == "little"
    return 1 if ours else 3


def _ends_equal(source: Source, model: Model) -> bool | None:
    keys = [param.key for param in model.params if param.name in ("embed", TIED)]
    if not is_tied(model, source.tensors, None) or not all(key in source.tensors for key in keys):
        return None
    return same_bytes(source.root, source.tensors[keys[0]], source.tensors[keys[1]])


@contextmanager
def budgeted(config: Config, address: str, *, verbose: bool) -> Iterator[Config]:
    """The config with the memory budget as a number; where it is a share of a cluster's nodes, the cluster stays joined for the block.

    `address` is a Ray cluster's, or "local". Raises RunError for a cluster that cannot be joined.
    """
    workers = config.workers
    if workers.memory_budget != "auto" or workers.executor != "ray" or address == "local":
        yield with_budget(config, worker_budget(config))
        return
    from shardconv.run import nodes, ray

    with ray.connected(address, None, verbose):
        processes = config.mesh.processes if config.mesh.places else None
        yield with_budget(config, nodes.shared_budget(nodes.nodes(), processes))


def with_budget(config: Config, budget: int) -> Config:
    """The config with another memory budget."""
    return config.model_copy(update={"workers": config.workers.model_copy(update={"memory_budget": budget})})


def worker_budget(config: Config) -> int:
    """Bytes that each worker may hold: as configured, or a share of this machine's free memory."""
    if config.workers.memory_budget != "auto":
        return config.workers.memory_budget
    machine = this_machine()
    if config.mesh.places:  # on a cluster one process per node
        alone = config.workers.executor == "local" or config.workers.address == "local"
        return default_budget(machine, config.mesh.processes if alone else 1)
    return default_budget(machine, config.workers.count or machine.cores)
