"""The figures of docs/loading.md: a Llama onto a mesh of eight CPU devices, by both layouts and by hand.

    python scripts/placements.py build/placements [--layers 12] [--rounds 3] [--processes 1 2]

For each rule, number of processes and way, fresh processes load the checkpoint, which is in the page cache, into scanned arrays
of the flat layout; they take turns, and figures are medians. Seconds are those of the load, without starting Python and JAX. Memory is the
peak of the heaviest process, of which the arrays are a part: all of them in one process, half of them in each of two. "by hand" is what
people write: safetensors' load_file, transposed and stacked by NumPy, and jax.device_put, which in several processes compares all arrays
between them, so that there it is jax.make_array_from_callback.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
DEVICES = 8
# Most kernels are split along stored rows by the first, and along stored columns by the second.
RULES = {
    "rows": {"heads": "x", "kv_heads": "x", "mlp": "x", "vocab": "x"},
    "columns": {"embed": "x"},
}
WAYS = ("host", "device", "by hand")


def source(root: Path, layers: int) -> Path:
    """The checkpoint, made once."""
    out = root / f"source-{layers}"
    if not (out / "config.json").exists():
        root.mkdir(parents=True, exist_ok=True)
        (root / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": layers}))
        command = [sys.executable, "-m", "shardconv", "synth", str(root / "config.json"), str(out), "--shard-size", "1GB"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out


def measure(checkpoint: Path, way: str, rules: str, processes: int) -> dict[str, float]:
    """Seconds of one program, CPU seconds and bytes read of all its processes, and the peak of the heaviest."""
    for file in checkpoint.iterdir():
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={DEVICES // processes}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    asked = [str(checkpoint), way, rules, str(processes), str(port)]
    running = [
        subprocess.Popen([sys.executable, __file__, "--child", *asked, str(rank)], env=environment, stdout=subprocess.PIPE, text=True)
        for rank in range(processes)
    ]
    said = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"failed: {way}, {rules}, {processes} processes")
    found = [json.loads(text.splitlines()[-1]) for text in said]
    return {
        "seconds": max(one["seconds"] for one in found),
        "cpu": sum(one["cpu"] for one in found),
        "read": sum(one["read"] for one in found),
        "peak": max(one["peak"] for one in found),
    }


def child(checkpoint: str, way: str, rules: str, processes: str, port: str, rank: str) -> None:
    """One process of a program that loads the checkpoint; prints what it took."""
    import jax

    if int(processes) > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(rank), cluster_detection_method="deactivate")
    from shardconv.mesh import loading
    from shardconv.run.heartbeat import memory

    mesh = jax.make_mesh((DEVICES,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    started, cpu = time.perf_counter(), time.process_time()
    planned = loading.plan_load(checkpoint, mesh, rules=RULES[rules], placement="host" if way == "by hand" else way)
    if way == "by hand":
        params, read = by_hand(Path(checkpoint), planned), sum(file.stat().st_size for file in Path(checkpoint).glob("*.safetensors"))
    else:
        loaded = planned.read()
        params, read = loaded.params, loaded.read.bytes_read
    jax.block_until_ready(params)
    took = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}
    print(json.dumps({**took, "read": read, "peak": memory()[1]}))


def by_hand(checkpoint: Path, planned) -> dict:
    """The same arrays by load_file, transposes and device_put; only their shardings are taken from the plan."""
    import jax
    import numpy as np
    from safetensors.numpy import load_file

    state = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        state |= load_file(file)
    layers, dim = sum(key.endswith("q_proj.weight") for key in state), LLAMA["head_dim"]

    def put(name, array):
        sharding = planned.leaves[name].sharding
        if jax.process_count() > 1:
            return jax.block_until_ready(jax.make_array_from_callback(array.shape, sharding, lambda index: array[index]))
        return jax.block_until_ready(jax.device_put(array, sharding))

    def stack(name, key, turn):
        return put(name, np.stack([turn(state.pop(f"model.layers.{layer}.{key}.weight")) for layer in range(layers)]))

    def heads(x):
        return x.T.reshape(x.shape[1], -1, dim)

    params = {
        "embed": put("embed", state.pop("model.embed_tokens.weight")),
        "final_norm": put("final_norm", state.pop("model.norm.weight")),
        "unembed": put("unembed", state.pop("lm_head.weight").T),
        "layers.attn_norm": stack("layers.attn_norm", "input_layernorm", lambda x: x),
        "layers.mlp_norm": stack("layers.mlp_norm", "post_attention_layernorm", lambda x: x),
        "layers.attn.o": stack("layers.attn.o", "self_attn.o_proj", lambda x: x.T.reshape(-1, dim, x.shape[0])),
    }
    params |= {f"layers.attn.{name}": stack(f"layers.attn.{name}", f"self_attn.{name}_proj", heads) for name in "qkv"}
    params |= {f"layers.mlp.{name}": stack(f"layers.mlp.{name}", f"mlp.{name}_proj", lambda x: x.T) for name in ("gate", "up", "down")}
    assert params.keys() == planned.leaves.keys()
    return params


def main() -> None:
    """Runs what was asked for, and prints the table."""
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    checkpoint = source(arguments.root, arguments.layers)
    total = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    cases = [(rules, processes, way) for rules in RULES for processes in arguments.processes for way in WAYS]
    found: dict[tuple, list[dict[str, float]]] = {case: [] for case in cases}
    for turn in range(arguments.rounds):
        for rules, processes, way in cases:
            row = measure(checkpoint, way, rules, processes)
            found[rules, processes, way].append(row)
            print(turn, rules, processes, way, {key: round(value, 2) for key, value in row.items()}, flush=True)
    print(f"\n{total / 1e9:.2f} GB\n\n| split along | processes | way | seconds (least to most) | CPU s | x read | heaviest process, MB |")
    print("|---|---|---|---|---|---|---|")
    for (rules, processes, way), rows in found.items():
        seconds = sorted(row["seconds"] for row in rows)
        cpu, read, peak = (statistics.median(row[key] for row in rows) for key in ("cpu", "read", "peak"))
        spread = f"{statistics.median(seconds):.1f} ({seconds[0]:.1f} to {seconds[-1]:.1f})"
        print(f"| {rules} | {processes} | {way} | {spread} | {cpu:.1f} | {read / total:.2f} | {peak / 1e6:.0f} |")


if __name__ == "__main__":
    main()
