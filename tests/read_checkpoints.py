"""Restores checkpoints by plain Orbax calls, in a process that knows nothing of shardconv: python read_checkpoints.py
ROOT.

ROOT/expected.json: [{"name", "step", "item", "arrays": {dotted name: [shape, dtype, hex of the bytes,
PartitionSpec]}}]. Prints, as JSON, for every checkpoint and every call what came back: "equal" and of which kind, or
the error's class.
"""

import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from orbax.checkpoint.experimental import v1

logging.disable()

# Their names before Orbax 0.12.
load = getattr(v1, "load", None) or v1.load_pytree
v1_metadata = getattr(v1, "metadata", None) or v1.pytree_metadata


def nest(leaves: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *path, last = name.split(".")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not hasattr(tree, "items"):
        return {prefix[:-1]: tree}
    return {name: leaf for key, child in tree.items() for name, leaf in flat(child, f"{prefix}{key}.").items()}


def verdict(restore: Callable[[], Any], arrays: dict[str, Any]) -> str:
    try:
        found = flat(restore())
    except Exception as error:  # noqa: BLE001  its class is the answer
        return type(error).__name__
    if found.keys() != arrays.keys():
        return f"other names: {sorted(found.keys() ^ arrays.keys())}"
    wrong = [name for name, (shape, dtype, data, _) in arrays.items() if not same(found[name], shape, dtype, data)]
    kinds = {
        "numpy" if not isinstance(leaf, jax.Array) else f"{len(leaf.sharding.device_set)} devices"
        for leaf in found.values()
    }
    return f"differ: {wrong}" if wrong else f"equal, {', '.join(sorted(kinds))}"


def same(found: Any, shape: list[int], dtype: str, data: str) -> bool:
    array = np.asarray(found)
    return list(array.shape) == shape and array.dtype.name == dtype and array.tobytes().hex() == data


def metadata(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:  # noqa: BLE001  its class is the answer
        return type(error).__name__


def calls(root: str, step: int | None, item: str | None, targets: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    checkpoint = root if step is None else f"{root}/{step}"
    final = f"{checkpoint}/{item}" if item else checkpoint
    standard, pytree = ocp.StandardCheckpointer(), ocp.PyTreeCheckpointer()

    def as_numpy() -> Any:
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), targets["numpy"])
        return pytree.restore(final, args=ocp.args.PyTreeRestore(targets["numpy"], restore_args=restore_args))

    def sharded() -> Any:
        restore_args = ocp.checkpoint_utils.construct_restore_args(targets["8 devices"])
        return pytree.restore(final, args=ocp.args.PyTreeRestore(targets["8 devices"], restore_args=restore_args))

    result: dict[str, Callable[[], Any]] = {
        "v0 PyTree, no target": lambda: pytree.restore(final),
        "v0 PyTree, numpy": as_numpy,
        "v0 PyTree, 8 devices": sharded,
        "v0 Standard, no target": lambda: standard.restore(final),
        "v1 load, no target": lambda: load(checkpoint),
    }
    for kind, target in targets.items():
        result[f"v0 Standard, {kind}"] = lambda target=target: standard.restore(final, target)
        result[f"v1 load, {kind}"] = lambda target=target: load(checkpoint, target)
    if step is not None:
        named = ocp.args.Composite(**{item or "default": ocp.args.StandardRestore(targets["8 devices"])})
        result["v0 Manager, no target"] = lambda: ocp.CheckpointManager(root).restore(step)
        result["v0 Manager, item, no target"] = lambda: ocp.CheckpointManager(root).restore(step)[item]
        result["v0 Manager, item, 8 devices"] = lambda: ocp.CheckpointManager(
            root, item_names=(item or "default",)
        ).restore(step, args=named)[item]
        result["v1 training, no target"] = lambda: v1.training.Checkpointer(root).load(step)
        result["v1 training, 8 devices"] = lambda: v1.training.Checkpointer(root).load(step, targets["8 devices"])
    return result


def documents(root: str, step: int | None, item: str | None) -> dict[str, Callable[[], Any]]:
    checkpoint = root if step is None else f"{root}/{step}"
    final = f"{checkpoint}/{item}" if item else checkpoint
    result: dict[str, Callable[[], Any]] = {
        "v0 PyTree": lambda: ocp.PyTreeCheckpointer().metadata(final).item_metadata.custom_metadata,
        "v1": lambda: v1_metadata(checkpoint).custom_metadata,
    }
    if step is not None:
        result["v0 Manager"] = lambda: ocp.CheckpointManager(root).metadata(step).custom_metadata
    return result


def main(folder: str) -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))
    with open(f"{folder}/expected.json") as file:
        expected = json.load(file)
    report = {}
    for place in expected:
        arrays, root = place["arrays"], f"{folder}/{place['name']}"
        kinds = {
            name: (shape, np.dtype(getattr(ml_dtypes, dtype, dtype))) for name, (shape, dtype, _, _) in arrays.items()
        }
        one = SingleDeviceSharding(jax.devices()[0])
        targets = {
            "numpy": {name: np.empty(*kind) for name, kind in kinds.items()},
            "1 device": {name: jax.ShapeDtypeStruct(*kind, sharding=one) for name, kind in kinds.items()},
            "8 devices": {
                name: jax.ShapeDtypeStruct(*kind, sharding=NamedSharding(mesh, PartitionSpec(*arrays[name][3])))
                for name, kind in kinds.items()
            },
        }
        trees = {kind: nest(target) for kind, target in targets.items()}
        found = {
            label: verdict(call, arrays) for label, call in calls(root, place["step"], place["item"], trees).items()
        }
        texts = {label: metadata(read) for label, read in documents(root, place["step"], place["item"]).items()}
        report[place["name"]] = {"calls": found, "metadata": texts}
    assert not any(name.startswith("shardconv") for name in sys.modules)
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
