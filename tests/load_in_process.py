"""One process of a program that loads a checkpoint: `python tests/load_in_process.py '{"rank": 0, ...}'`; what it found is printed as JSON.

`load_in` starts all processes of such a program on this machine and gathers what they found.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def load_in(processes: int, source: Path, axes: dict[str, int], *, devices: int = 2, **choices: Any) -> list[dict[str, Any]]:
    """Loads a checkpoint in so many processes of some devices each, over a mesh of all; what each of them found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
    }
    asked = {"count": processes, "port": port, "source": str(source), "axes": axes, "choices": choices}
    command = [sys.executable, str(HERE / "load_in_process.py")]
    running = [
        subprocess.Popen(
            [*command, json.dumps({"rank": rank, **asked})], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(processes)
    ]
    try:
        said = [process.communicate(timeout=240) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, errors) in zip(running, said, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [json.loads(out.splitlines()[-1]) | {"stderr": errors} for out, errors in said]


def main(asked: dict[str, Any]) -> dict[str, Any]:
    import jax

    if asked["count"] > 1:
        jax.distributed.initialize(
            f"127.0.0.1:{asked['port']}", asked["count"], asked["rank"], cluster_detection_method="deactivate", heartbeat_timeout_seconds=20
        )
    import numpy as np
    import xxhash

    import shardconv
    from shardconv.dtypes import raw_view
    from shardconv.errors import ShardconvError
    from shardconv.run.heartbeat import memory

    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(tuple(asked["axes"].values())), tuple(asked["axes"]))
    try:
        planned = shardconv.plan_load(asked["source"], mesh, **asked["choices"])
    except ShardconvError as error:
        return {"error": str(error)}
    before = memory()[1]
    loaded = planned.read()
    after, shards, held = memory()[1], [], 0
    for path, array in jax.tree_util.tree_flatten_with_path(loaded.params)[0]:
        for shard in array.addressable_shards:
            box = [side.indices(n)[:2] for side, n in zip(shard.index, array.shape, strict=True)]
            bits = np.ascontiguousarray(raw_view(np.asarray(shard.data)))
            held += bits.nbytes
            shards.append((".".join(step.key for step in path), box, xxhash.xxh3_64_hexdigest(bits.data)))
    return {
        "ways": dict(planned.ways),
        "read": loaded.read.bytes_read if loaded.read else 0,
        "needed": loaded.read.bytes_needed if loaded.read else 0,
        "shards": shards,
        "held": held,
        "before": before,
        "after": after,
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))  # noqa: T201
