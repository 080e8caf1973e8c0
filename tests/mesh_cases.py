"""Leaves for the tests of both layouts on devices: of any address onto any mesh, and of every family of models, with any bits."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import jax
import numpy as np
from algebra_oracle import World
from hf_models import CONFIGS, ONE_EACH, small
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from layout_oracle import rows, stored_shapes
from stored import random_array

from shardconv.boxes import whole
from shardconv.dtypes import dtype_named, dtype_of_code, raw_view
from shardconv.families import find
from shardconv.family import LayoutOptions, bind
from shardconv.formats import StoredTensor
from shardconv.formats.reading import Reader
from shardconv.formats.writing import NewTensor, write_checkpoint
from shardconv.layouts import LAYOUTS
from shardconv.leaf import Leaf, Part
from shardconv.plan import READ_GAP, Plan, PlanOptions, make_plan
from shardconv.run.work import Workspace, make_box
from shardconv.sharding import MeshRules
from shardconv.source import open_source
from shardconv.values import ValueRule

Stored = Mapping[str, StoredTensor]

# Meshes of up to eight devices with one to three axes, and rules that split dims of every kind: rows and columns of what is stored, layers
# and experts (in the names), the digits of a dim, a padded dim, and none at all.
MESHES: Mapping[str, tuple[Mapping[str, int], Mapping[str, tuple[str, ...]]]] = {
    "rows": ({"x": 2}, {"heads": ("x",), "kv_heads": ("x",), "mlp": ("x",)}),
    "columns": ({"x": 8}, {"embed": ("x",), "head_dim": ("x",)}),
    "both": (
        {"x": 4, "y": 2},
        {"vocab": ("x", "y"), "embed": ("x",), "heads": ("y",), "kv_heads": ("y",), "mlp": ("y",), "experts": ("x",)},
    ),
    "stages": ({"x": 2, "y": 2, "z": 2}, {"layers": ("z",), "experts": ("y",), "embed": ("x", "y"), "head_dim": ("y",), "mlp": ("x",)}),
    "copies": ({"x": 2, "y": 4}, {}),
}


def config_of(family: str) -> dict[str, Any]:
    """A small model of a family, whose experts a mesh of two or four divides."""
    experts = {key: 4 for key in ("num_local_experts", "num_experts") if key in CONFIGS[ONE_EACH[family]]}
    return small(ONE_EACH[family], **experts)


def checkpoint(config: Mapping[str, Any], directory: Path, code: str = "BF16", bytes_per_file: int = 3000) -> Path:
    """A checkpoint of a model in several files, of any bit patterns, NaNs and all."""
    tied = config.get("tie_word_embeddings", config["model_type"] == "gemma2")
    shapes = stored_shapes(rows("flat", config, "half"), config, tied)
    arrays = {key: random_array(code, shape, seed) for seed, (key, shape) in enumerate(shapes.items())}
    tensors = [NewTensor(key, code, array.shape) for key, array in arrays.items()]
    directory.mkdir(parents=True, exist_ok=True)
    write_checkpoint(directory, tensors, lambda tensor: [arrays[tensor.name].tobytes()], max_file_bytes=bytes_per_file, metadata={})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def plan_of(directory: Path, layout: str, mesh: str | MeshRules, *, scan: bool = True, dtype: str = "source", vocab: int = 40) -> Plan:
    """The plan of a checkpoint for a mesh, or one of MESHES, its vocabulary padded to 40."""
    source = open_source(directory)
    config = source.config or {}
    model = bind(find(config), config)
    options = PlanOptions(dtype, MeshRules(*MESHES[mesh]) if isinstance(mesh, str) else mesh, 64 << 20, 1 << 30)
    return make_plan(source, model, LAYOUTS[layout](model, LayoutOptions(scan, "auto", vocab, "")), options)


def mesh_of(axes: Mapping[str, int]) -> Mesh:
    """The first devices as a mesh."""
    count = math.prod(axes.values())
    return Mesh(np.array(jax.devices()[:count]).reshape(tuple(axes.values())), tuple(axes))


def sharding_of(leaf: Leaf, mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*leaf.spec))


def made(leaf: Leaf, stored: Stored, root: str) -> np.ndarray:
    """The whole leaf, made by one call, as raw integers."""
    out = np.empty(leaf.shape, dtype_named(leaf.dtype).numpy)
    with Reader(root, coalesce_gap=READ_GAP) as reader:
        make_box(leaf, whole(leaf.shape), stored, reader, Workspace(), out)
    return raw_view(out)


def bits(array: jax.Array) -> np.ndarray:
    """The whole array as raw integers, put together from its shards, each of which is of the device that the sharding says."""
    out = np.empty(array.shape, array.dtype)
    indices = array.sharding.addressable_devices_indices_map(array.shape)
    for shard in array.addressable_shards:
        assert shard.index == indices[shard.device] and shard.data.devices() == {shard.device}
        out[shard.index] = np.asarray(shard.data)
    return raw_view(out)


def needed(leaf: Leaf) -> int:
    """Bytes that the leaf's parts have in the source, where each is of one dtype."""
    sizes = [math.prod(digit.size for dim in part.target.dims for digit in dim) for part in leaf.parts]
    return sum(size * dtype_of_code(part.dtypes[0]).bits // 8 for size, part in zip(sizes, leaf.parts, strict=True))


# --- any address ------------------------------------------------------------------------------------------------------------------


@dataclass
class Drawn:
    """The leaves of two random places over the same axes: what is stored in a file, and what each leaf should be."""

    root: str
    stored: dict[str, StoredTensor] = field(default_factory=dict)
    leaves: list[tuple[Leaf, np.ndarray]] = field(default_factory=list)


def drawn(world: World, folder: Path) -> Drawn:
    """A world's source place as a file of int32, and a leaf for each tensor of its target place, with zeros for room."""
    found = Drawn(str(folder))
    at = 0
    with (folder / "stored").open("wb") as file:
        for key, tensor in world.stored(world.source).items():
            data = (tensor.astype(np.int32) + 1).tobytes()
            found.stored[key] = StoredTensor(key, "stored", "I32", tensor.shape, at, len(data))
            at += file.write(data)
    source, target = world.address(world.source), world.address(world.target)
    wanted = world.stored(world.target)
    for name, index in target.keys():
        part = Part("p", ("I32",), source, target, index, ValueRule())
        zeros = int((wanted[name] < 0).sum())
        shape = target.shape
        leaf = Leaf((name,), target.name, shape, "int32", shape, shape, (None,) * len(shape), (part,), True, zeros)
        found.leaves.append((leaf, wanted[name].astype(np.int32) + 1))
    return found


def some_sharding(dice: Random, shape: tuple[int, ...]) -> NamedSharding:
    """A mesh of up to eight devices, and a spec of some of its axes that divides the shape."""
    axes = dict(dice.choice([{"x": 2}, {"x": 3}, {"x": 8}, {"x": 2, "y": 2}, {"x": 2, "y": 3}, {"x": 2, "y": 2, "z": 2}]))
    left = list(shape)
    spec: list[list[str]] = [[] for _ in shape]
    for name in dice.sample(list(axes), len(axes)):
        fits = [dim for dim, n in enumerate(left) if n % axes[name] == 0]
        if fits and dice.random() < 0.8:
            dim = dice.choice(fits)
            spec[dim].append(name)
            left[dim] //= axes[name]
    return NamedSharding(mesh_of(axes), PartitionSpec(*(tuple(entry) for entry in spec)))

