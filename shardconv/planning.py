"""From a config to a plan: open the source, find the family, bind it, lay it out, plan. Headers only."""

from shardconv.budget import default_budget, this_machine
from shardconv.config import Config
from shardconv.errors import InputError, Problem
from shardconv.families import find
from shardconv.family import LayoutOptions, bind
from shardconv.layouts import LAYOUTS
from shardconv.plan import Plan, PlanOptions, make_plan
from shardconv.sharding import MeshRules
from shardconv.source import open_source


def plan_from_config(config: Config, ends_equal: bool | None = None) -> Plan:
    """Plans a conversion; see `shardconv.plan.PlanOptions` for `ends_equal`. Raises InputError with all that is wrong."""
    source = open_source(config.source.path)
    if source.config is None:
        fact = f"{source.root} has no config.json"
        raise InputError("the model's numbers are not known", [Problem(fact, "put the checkpoint's config.json beside its weights")])
    if config.target.layout not in LAYOUTS:
        fact = f"target.layout is {config.target.layout!r}"
        raise InputError("there is no such layout", [Problem(fact, f"known: {', '.join(LAYOUTS)}")])
    target = config.target
    model = bind(find(source.config, config.model.family), source.config)
    chosen = LayoutOptions(target.scan_layers, target.rope, target.vocab_size or 0, target.query_dtype or "")
    options = PlanOptions(
        dtype=target.dtype,
        mesh=MeshRules(config.mesh.axes, config.mesh.rules),
        chunk_bytes=config.output.chunk_bytes,
        memory_budget=worker_budget(config),
        ends_equal=ends_equal,
    )
    return make_plan(source, model, LAYOUTS[target.layout](model, chosen), options)


def worker_budget(config: Config) -> int:
    """Bytes that each worker may hold: as configured, or a share of this machine's free memory."""
    if config.workers.memory_budget != "auto":
        return config.workers.memory_budget
    machine = this_machine()
    return default_budget(machine, config.workers.count or machine.cores)
