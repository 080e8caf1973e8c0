"""The figures of docs/benchmarks.md: whole processes against `cp -r` of the same files, interleaved, medians, as ratios.

    python scripts/benchmark.py build/bench [--rounds 5] [--only speed|memory|amplification] [--peer]

Every command is followed by `sync`, which counts. Before each the source is read once, so that all start with it in the page cache, and
the output of the one before is deleted and synced. Wall time is the whole process, start-up included; `report.json` says how much of
it was converting. CPU seconds are those of the process and its children (of a Ray run: as its report counts them).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
# 16 layers and the embedding are 2.5 GB in bfloat16; 78 are 10 GB.
SIZES = {"2.5GB": 16, "10GB": 78}
MESHES = {1: {}, 8: {"fsdp": 8}, 64: {"fsdp": 16, "tensor": 4}}
RULES = {"embed": "fsdp", "vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}
SHARDCONV = [sys.executable, "-m", "shardconv"]


def source(root: Path, size: str) -> Path:
    """The checkpoint of a size, made once."""
    out = root / f"source-{size}"
    if not (out / "config.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        config = root / f"{size}.json"
        config.write_text(json.dumps({**LLAMA, "num_hidden_layers": SIZES[size]}))
        subprocess.run([*SHARDCONV, "synth", str(config), str(out), "--shard-size", "1GB"], check=True)
    return out


def convert(root: Path, checkpoint: Path, out: Path, executor: str, *, mesh: int = 8, **settings: object) -> list[str]:
    """The command that converts `checkpoint` to `out`, without the check unless `settings` ask for it."""
    rules = {axis: name for axis, name in RULES.items() if name in MESHES[mesh]}
    values = {
        "source.path": str(checkpoint),
        "output.path": str(out),
        "target.layout": "maxtext",
        "mesh.axes": MESHES[mesh],
        "mesh.rules": rules,
        "workers.executor": executor,
        "check.mode": "none",
        **settings,
    }
    config = root / "bench.toml"
    config.write_text("")
    return [*SHARDCONV, "run", "-q", str(config), *(part for key, value in values.items() for part in ("--set", f"{key}={_toml(value)}"))]


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


def measure(command: list[str], checkpoint: Path, out: Path) -> dict[str, float]:
    """Seconds of a command and a `sync`, CPU seconds and peak RSS in bytes of its heaviest process."""
    for path in (out, Path(f"{out}.shardconv")):
        shutil.rmtree(path, ignore_errors=True)
    subprocess.run(["sync"], check=True)
    for file in checkpoint.iterdir():
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    subprocess.run(["sync"], check=True)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"failed with status {status}: {' '.join(command)}")
    return {"wall": seconds, "cpu": usage.ru_utime + usage.ru_stime, "rss": usage.ru_maxrss * 1024.0}


def report(out: Path) -> dict[str, object]:
    """The report that a run left beside its output."""
    return dict(json.loads(Path(f"{out}.shardconv/report.json").read_text()))


def speed(root: Path, rounds: int, peer: bool) -> None:
    """`run` on both executors, `cp -r`, and the script people write, one after another, again and again."""
    checkpoint, out = source(root, "2.5GB"), root / "out"
    commands = {
        "cp -r": ["cp", "-r", str(checkpoint), str(out)],
        "shardconv, local": convert(root, checkpoint, out, "local"),
        "shardconv, local, checked": convert(root, checkpoint, out, "local", **{"check.mode": "weights"}),
        "shardconv, Ray": convert(root, checkpoint, out, "ray"),
    }
    if peer:
        commands["safetensors + jnp + Orbax"] = [sys.executable, "scripts/peer_script.py", str(checkpoint), str(out)]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for turn in range(rounds):
        for name, command in commands.items():
            row = measure(command, checkpoint, out)
            if name.startswith("shardconv"):
                facts = report(out)
                stages = facts["stages"]
                assert isinstance(stages, dict)
                row |= {f"stage {key}": float(value) for key, value in stages.items()}
                row |= {"cpu": float(str(facts["cpu_seconds"])), "rss": float(str(facts["peak_rss_bytes"]))}
            found[name].append(row)
            print(turn, name, json.dumps({key: round(value, 3) for key, value in row.items()}), flush=True)
    base = statistics.median(row["wall"] for row in found["cp -r"])
    print("\n| | wall s (least to most) | x cp | CPU s | peak RSS, MB | stages s |\n|---|---|---|---|---|---|")
    for name, rows in found.items():
        walls = [row["wall"] for row in rows]
        middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        stages = ", ".join(f"{key.removeprefix('stage ')} {value:.2f}" for key, value in middle.items() if key.startswith("stage "))
        print(
            f"| {name} | {middle['wall']:.2f} ({min(walls):.2f} to {max(walls):.2f}) | {middle['wall'] / base:.2f}"
            f" | {middle['cpu']:.1f} | {middle['rss'] / 1e6:.0f} | {stages} |"
        )


def memory(root: Path) -> None:
    """The heaviest worker on two sizes of source at one budget."""
    print("| source | budget MB | heaviest worker MB |\n|---|---|---|")
    for size in SIZES:
        out = root / "out"
        checkpoint = source(root, size)
        measure(convert(root, checkpoint, out, "ray", **{"workers.memory_budget": "512MiB"}), checkpoint, out)
        facts = report(out)
        budget, peak = int(str(facts["memory_budget_bytes"])), int(str(facts["peak_rss_bytes"]))
        print(f"| {size} | {budget / 1e6:.0f} | {peak / 1e6:.0f} |", flush=True)


def amplification(root: Path) -> None:
    """Bytes read and written against those that there are, on meshes of 1, 8 and 64 devices."""
    checkpoint, out = source(root, "2.5GB"), root / "out"
    print("| layers | mesh | read | written | requests |\n|---|---|---|---|---|")
    for scan in (True, False):
        for mesh in MESHES:
            measure(convert(root, checkpoint, out, "local", mesh=mesh, **{"target.scan_layers": scan}), checkpoint, out)
            facts = report(out)
            words = "scanned" if scan else "unscanned"
            read, written = float(str(facts["read_amplification"])), float(str(facts["write_amplification"]))
            print(f"| {words} | {mesh} | {read:.4f} | {written:.4f} | {facts['requests']} |", flush=True)


def main() -> None:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("speed", "memory", "amplification"))
    parser.add_argument("--peer", action="store_true", help="also the script that people write by hand")
    arguments = parser.parse_args()
    arguments.root.mkdir(parents=True, exist_ok=True)
    if arguments.only in (None, "speed"):
        speed(arguments.root, arguments.rounds, arguments.peer)
    if arguments.only in (None, "memory"):
        memory(arguments.root)
    if arguments.only in (None, "amplification"):
        amplification(arguments.root)


if __name__ == "__main__":
    main()
