"""`shardconv.load`: a checkpoint straight onto a mesh, as the arrays that a training job begins with. Nothing is written.

    params = shardconv.load("checkpoints/Llama-3.1-8B", mesh, layout="maxtext", rules={"embed": "fsdp", "heads": "tensor"})

It is a plan and its execution, and both can be had apart: `plan_load` reads headers, compares all with what the user wants, and says what
would be loaded how; `Loading.read` loads it. What must be known of the arrays besides their values, such as that an output projection is
left out because it is the embedding, or in which order rotary dims are, is in `Loading.notes`, in words, and in `Loading.metadata`; `load`
logs the notes as warnings of the logger "shardconv", which by default are printed.

In a program of several processes each of them calls `load` alike, and reads what its own devices need. Besides the arrays a process holds
what `memory_budget` allows, and the shards of one array where its devices have a memory of their own.
"""

import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict, Unpack

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from shardconv.boxes import Box
from shardconv.budget import default_budget, parse_size, this_machine
from shardconv.config import Config, config_of
from shardconv.dtypes import dtype_named
from shardconv.errors import ConfigError, InputError, Problem
from shardconv.formats.reading import ReadCounts, Reader
from shardconv.leaf import Leaf
from shardconv.mesh import device, host
from shardconv.mesh.abstract import Wanted, fitted, wanted
from shardconv.mesh.choosing import Way, can_exchange, choose
from shardconv.mesh.host import index_box, require_held
from shardconv.plan import READ_GAP, Plan
from shardconv.planning import plan_from_config
from shardconv.run.work import Workspace
from shardconv.sinks.listing import pytrees
from shardconv.sinks.paths import STAGE_SUFFIX
from shardconv.source import check_unchanged
from shardconv.toml import read_toml, toml_key, toml_value
from shardconv.values import is_float
from shardconv.verify.forwards import nested

log = logging.getLogger("shardconv")

Rules = Mapping[str, str | Sequence[str] | None]
Placement = Literal["auto", "host", "device"]

# The largest tile: beyond, reads are no faster, and rows have long left the cache when they are handed out.
TILE = 16 << 20


@dataclass(frozen=True)
class Loaded:
    """The arrays, what was read for them in this process, and the seconds that it took; an Orbax checkpoint's bytes are not counted."""

    params: Any
    read: ReadCounts | None
    seconds: float


@dataclass(frozen=True)
class Loading:
    """A load that is planned: every array with its sharding, the way it takes onto the mesh, and what is to be known of it."""

    leaves: Mapping[str, jax.ShapeDtypeStruct]
    ways: Mapping[str, Way]
    notes: tuple[str, ...]
    metadata: Mapping[str, Any]
    like: Wanted | None
    arrays: Callable[[], tuple[Mapping[str, jax.Array], ReadCounts | None]]

    @property
    def abstract(self) -> Any:
        """The tree that `read` gives, of `jax.ShapeDtypeStruct`s with shardings."""
        return self._tree(self.leaves)

    def read(self) -> Loaded:
        """Loads it; every process of the program calls it. Raises InputError or RunError where the source cannot be read."""
        started = time.perf_counter()
        arrays, counts = self.arrays()
        return Loaded(self._tree(arrays), counts, time.perf_counter() - started)

    def _tree(self, leaves: Mapping[str, Any]) -> Any:
        return nested(leaves) if self.like is None else self.like.fill(leaves)


class Choices(TypedDict, total=False):
    """What may be said about a load; all of it may be left out.

    rules: the mesh axes that split each named axis, as [mesh] rules has them, or None for none; `{}` splits nothing.
    like: a tree of shardings, or of arrays or `jax.ShapeDtypeStruct`s. Its names, shapes and dtypes must be those of what is loaded; the
        result has its structure, and its shardings where it has some. Of an array that JAX has put where it liked, such as `jnp.zeros`
        makes (`committed` is False), the sharding is not taken.
    mapping: as in [target], or a dict of what is under [mapping] there.
    layout, scan_layers, dtype, rope, vocab_size: as in [target]; unless said otherwise "flat", scanned, each tensor's own dtype.
    family, ignore: as in [model]; prefix: as in [source].
    placement: "host", "device", or "auto" for each array by what would be read; what only the hosts can do, they do.
    memory_budget: bytes, or a size such as "2GiB", that a process may hold besides the arrays; by default a share of what is free.
    """

    rules: Rules | None
    like: Any
    layout: str | None
    mapping: str | Mapping[str, Any] | None
    scan_layers: bool | None
    dtype: str | None
    rope: str | None
    vocab_size: int | None
    family: str | None
    ignore: Sequence[str] | None
    prefix: str | None
    placement: Placement
    memory_budget: int | str | None


# The section of a config that each choice is a key of; the others are told to nobody else.
SECTIONS: Mapping[str, tuple[str, ...]] = {
    "source": ("prefix",),
    "model": ("family", "ignore"),
    "target": ("layout", "mapping", "scan_layers", "dtype", "rope", "vocab_size"),
    "workers": ("memory_budget",),
}


def load(source: str | os.PathLike[str], mesh: Mesh | None = None, **choices: Unpack[Choices]) -> Any:
    """Loads a checkpoint onto a mesh, as nested dicts of `jax.Array`, or as a tree like `like`; see `plan_load` and `Choices`.

    Raises ConfigError for what was asked, before an array is loaded, and InputError where the source is not what it should be. Read before
    that are headers, and the two ends of a model that config.json calls tied where both are stored.
    """
    planned = plan_load(source, mesh, **choices)
    if jax.process_index() == 0:
        for note in planned.notes:
            log.warning("%s", note)
    return planned.read().params


def plan_load(source: str | os.PathLike[str], mesh: Mesh | None = None, **choices: Unpack[Choices]) -> Loading:
    """Plans a load; it raises what `load` does.

    It reads headers, and one thing more: where config.json calls a model tied and its embedding and output projection are both stored, it
    reads and compares the two.

    `source` is a directory, file or index of safetensors or PyTorch files; an Orbax checkpoint, its step or its item; or a config, *.toml,
    of which [source], [model], [target], [mesh] and the memory budget of [workers] are taken, and arguments go before them. `mesh` is the
    devices; it may be left out where `like` has all shardings, or where a config has [mesh] axes for as many devices as there are.
    """
    if unknown := sorted(choices.keys() - Choices.__annotations__.keys()):
        raise TypeError(f"load() got an unexpected keyword argument {unknown[0]!r}")
    path, placement = os.fspath(source), choices.get("placement", "auto")
    if placement not in ("auto", "host", "device"):
        raise ConfigError("there is no such placement", [Problem(f"placement is {placement!r}", 'give "auto", "host" or "device"')])
    _require_mesh(mesh)
    rules = _tuples(choices.get("rules"))
    like = wanted(choices["like"]) if choices.get("like") is not None else None
    if not path.endswith(".toml") and (folder := tree_at(path)):
        return _plan_restore(folder, mesh, rules, like, choices)
    with _mapping_in_a_file(choices) as named:
        config, mesh, split = _config(path, mesh, rules, named)
        if not split and like is None:
            raise _unsplit(mesh)
        budget = _budget(config.workers.memory_budget)
        workers = config.workers.model_copy(update={"memory_budget": budget})
        plan = plan_from_config(config.model_copy(update={"workers": workers}), compare_ends=True)
    leaves = fitted(_abstract(plan, mesh if split else None), like, "the checkpoint")
    ways = {leaf.name: _way(leaf, leaves[leaf.name].sharding, plan, placement) for leaf in plan.leaves}
    metadata = {**plan.metadata, "family": plan.family, "layout": plan.layout, "tied": plan.tied}
    return Loading(leaves, ways, plan.notes, metadata, like, lambda: _stream(plan, leaves, ways, budget))


@contextmanager
def _mapping_in_a_file(choices: Choices) -> Iterator[Choices]:
    """The choices with the path of a mapping that is given as a dict: plans are made from configs, which name a file."""
    mapping = choices.get("mapping")
    if not isinstance(mapping, Mapping):
        yield choices
        return
    with tempfile.TemporaryDirectory() as folder:
        path, named = os.path.join(folder, "mapping.toml"), choices.copy()
        lines = {name: [*map(str, line)] if isinstance(line, list | tuple) else str(line) for name, line in mapping.items()}
        with open(path, "w", encoding="utf-8") as file:
            file.write("[mapping]\n" + "".join(f"{toml_key(str(name))} = {toml_value(line)}\n" for name, line in lines.items()))
        named["mapping"] = path
        yield named


def _require_mesh(said: object) -> None:
    """Raises ConfigError for what is given as a mesh and is none, such as a dict, or an AbstractMesh, which has no devices."""
    if said is not None and not isinstance(said, Mesh):
        remedy = "give a jax.sharding.Mesh, which has devices, such as jax.make_mesh makes"
        raise ConfigError("the mesh cannot be used", [Problem(f"mesh is {type(said).__name__}", remedy)])


def _unsplit(mesh: Mesh | None) -> ConfigError:
    """The error for a load of which nothing says how arrays are split: to hold all of them on each device is seldom what is meant."""
    remedy = 'give rules such as {"embed": "fsdp"}, or a tree of shardings as like; rules={} puts all arrays on every device'
    if mesh is None:
        return ConfigError("there is no mesh", [Problem("neither a mesh nor shardings were given", "give a mesh and rules, or like")])
    return ConfigError("nothing says how arrays are split", [Problem(f"the mesh has {mesh.size} devices and there are no rules", remedy)])


def tree_at(path: str) -> str | None:
    """The directory at `path`, or below it by step and item, that has an Orbax tree; None where there is none.

    Raises ConfigError where there are several. Orbax itself is not loaded to see that.
    """
    folders = [folder for folder in pytrees(path) if STAGE_SUFFIX not in os.path.abspath(folder)]
    if len(folders) > 1:
        problems = [Problem(folder, "give the path of this one to load it") for folder in folders]
        raise ConfigError(f"{path} holds several checkpoints", problems)
    return os.path.abspath(folders[0]) if folders else None


def _config(
    path: str, mesh: Mesh | None, rules: Mapping[str, tuple[str, ...]] | None, choices: Choices
) -> tuple[Config, Mesh | None, bool]:
    """The config of a load, its mesh, and whether anything says how arrays are split."""
    written, said = path.endswith(".toml"), dict(choices)
    data: dict[str, Any] = read_toml(path) if written else {"source": {"path": path}, "target": {"layout": "flat"}}
    if not written:
        data["output"] = {"path": path.rstrip("/") + ".orbax"}  # a config has one; nothing is written there
    for name, keys in SECTIONS.items():
        given = {key: said[key] for key in keys if said.get(key) is not None}
        if given and isinstance(data.setdefault(name, {}), Mapping):
            data[name] = {**data[name], **given}
    old = data["mesh"] if isinstance(data.get("mesh"), Mapping) else {}
    mesh = mesh if mesh is not None else _mesh_of(old.get("axes"))
    if mesh is not None:
        data["mesh"] = {"axes": dict(mesh.shape), "rules": old.get("rules", {}) if rules is None else dict(rules)}
    config = config_of(data, lambda _: path if written else "load")
    return config, mesh, mesh is not None and (rules is not None or bool(config.mesh.rules) or mesh.size == 1)


def _mesh_of(axes: object) -> Mesh | None:
    """The mesh of a config's axes, over all devices; None where they are none. Raises ConfigError where there are more or fewer."""
    if not isinstance(axes, Mapping) or not axes or not all(type(size) is int and size > 0 for size in axes.values()):
        return None
    count = math.prod(axes.values())
    if count != jax.device_count():
        fact = f"[mesh] axes are of {count} devices, and there are {jax.device_count()}"
        raise ConfigError("the mesh cannot be made", [Problem(fact, "give a mesh: shardconv.load(config, mesh)")])
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def _budget(said: int | str) -> int:
    """Bytes that this process may hold; processes of one program may all be on one machine."""
    if said == "auto":
        return default_budget(this_machine(), jax.process_count())
    return said if isinstance(said, int) else parse_size(said)


def _abstract(plan: Plan, mesh: Mesh | None) -> dict[str, jax.ShapeDtypeStruct]:
    """The plan's leaves, with the shardings that its rules give on a mesh, if there is one."""
    found = {}
    for leaf in plan.leaves:
        require_held(leaf.dtype)
        sharding = NamedSharding(mesh, PartitionSpec(*leaf.spec)) if mesh is not None else None
        found[leaf.name] = jax.ShapeDtypeStruct(leaf.shape, dtype_named(leaf.dtype).numpy, sharding=sharding)
    return found


def _way(leaf: Leaf, sharding: Sharding, plan: Plan, placement: Placement) -> Way:
    if placement == "host" or not isinstance(sharding, NamedSharding) or not can_exchange(leaf):
        return "host"
    if placement == "device":
        return "device"
    boxes: dict[int, list[Box]] = {}
    one: Any
    for one, index in sharding.devices_indices_map(leaf.shape).items():
        boxes.setdefault(one.process_index, []).append(index_box(index, leaf.shape))
    return choose(leaf, tuple(boxes.values()), plan.tensors)


def _stream(
    plan: Plan, leaves: Mapping[str, jax.ShapeDtypeStruct], ways: Mapping[str, Way], budget: int
) -> tuple[Mapping[str, jax.Array], ReadCounts]:
    workspace, found = Workspace(), {}
    with Reader(plan.source.root, coalesce_gap=READ_GAP) as reader:
        for leaf in plan.leaves:
            tile = min(TILE, budget // (1 + leaf.rows_ratio))
            place = device.place if ways[leaf.name] == "device" else host.place
            found[leaf.name] = place(leaf, leaves[leaf.name].sharding, plan.tensors, reader, workspace, tile)
        if problems := check_unchanged(plan.source, reader.touched):
            raise InputError("the source changed while it was loaded", problems)
        return found, reader.counts


def _plan_restore(
    folder: str, mesh: Mesh | None, rules: Mapping[str, tuple[str, ...]] | None, like: Wanted | None, choices: Choices
) -> Loading:
    """The load of an Orbax checkpoint."""
    from shardconv.mesh.checkpoints import described, restored, ruled

    remedy = "an Orbax checkpoint is loaded as it was written: leave it out"
    apart = ("rules", "like", "dtype", "memory_budget", "placement")
    problems = [Problem(f"{name} does not apply", remedy) for name, value in choices.items() if name not in apart and value is not None]
    if problems:
        raise ConfigError(f"{folder} is an Orbax checkpoint", problems)
    # The config is not used but for these two, which it checks.
    config, _, _ = _config(folder, None, None, {"dtype": choices.get("dtype"), "memory_budget": choices.get("memory_budget")})
    found = described(folder)
    if like is None and (mesh is None or (rules is None and not found.known(mesh))):
        raise _unsplit(mesh)
    if rules is not None and mesh is not None:
        found = ruled(found, rules, mesh) if rules else replace(found, specs={})
    bare = found.abstract(mesh, split=rules is not None or found.known(mesh))
    leaves = fitted(_cast(bare, config.target.dtype), like, "the checkpoint")
    metadata = {key: value for key, value in found.metadata.items() if key != "shardconv"} | dict(found.metadata.get("shardconv", {}))
    budget = _budget(config.workers.memory_budget)
    return Loading(leaves, {}, (), metadata, like or wanted(found.tree), lambda: (restored(found, leaves, budget), None))


def _tuples(rules: object) -> dict[str, tuple[str, ...]] | None:
    """A user's rules as a config has them, where there are some; raises ConfigError with all that are none."""
    if rules is None:
        return None
    title, remedy = "rules do not say how arrays are split", 'give the mesh axes of each named axis, such as {"embed": "fsdp"}'
    if not isinstance(rules, Mapping):
        raise ConfigError(title, [Problem(f"rules is {rules!r}", remedy)])
    found = {axis: _axes(rule) for axis, rule in rules.items()}
    problems = [Problem(f"rules: {axis!r} is no name of an axis", remedy) for axis in found if not isinstance(axis, str)]
    remedy = 'give mesh axes: one such as "fsdp", several such as ("fsdp", "tensor"), or None'
    odd = [axis for axis, rule in found.items() if not all(isinstance(name, str) and name for name in rule)]
    problems += [Problem(f"rules: {axis!r} is split by {rules[axis]!r}", remedy) for axis in odd]
    if problems:
        raise ConfigError(title, problems)
    return found


def _axes(rule: object) -> tuple[Any, ...]:
    """The mesh axes of one rule, whatever they are; "" and None are none, as in a config and in Flax."""
    if rule is None or (isinstance(rule, str) and not rule):
        return ()
    return tuple(rule) if isinstance(rule, list | tuple) else (rule,)


def _cast(leaves: Mapping[str, jax.ShapeDtypeStruct], dtype: str) -> Mapping[str, jax.ShapeDtypeStruct]:
    """The leaves with another dtype where they are floats."""
    if dtype == "source":
        return leaves
    wanted = dtype_named(dtype)
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, wanted.numpy, sharding=leaf.sharding) if is_float(dtype_named(leaf.dtype.name)) else leaf
        for name, leaf in leaves.items()
    }
