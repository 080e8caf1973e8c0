"""Logits of a checkpoint larger than the memory it is checked in: 8 GB of random weights, under 3 GB for the whole process tree.

    python scripts/big_logits.py build/big [--layers 64] [--limit 3.0] [--keep]

A Llama of 64 layers and a vocabulary of 32,000, 4.0 billion parameters in bfloat16, is made by `shardconv synth` and converted without a
check. Then `shardconv verify --check logits` compares its logits, with `check.memory = "512MiB"`: far less than the arrays take, so that
both sides go block by block. The resident memory of all processes of that command is summed ten times a second; pages that processes share
count once for each, so the true peak is lower. Exit code 1 if the sum was ever over the limit or the logits are not equal.

It needs 17 GB of disk under the given directory and some ten minutes on two cores; what it made is deleted at the end, without --keep.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
SHARDCONV = [sys.executable, "-m", "shardconv"]


def make(root: Path, layers: int) -> Path:
    """The checkpoint and what it is converted to; returns the config."""
    model, config = root / "model.json", root / "big.toml"
    model.write_text(json.dumps({**MODEL, "num_hidden_layers": layers}))
    subprocess.run([*SHARDCONV, "synth", str(model), str(root / "source"), "--shard-size", "1GB"], check=True)
    config.write_text(
        f'[source]\npath = "{root}/source"\n[target]\nlayout = "maxtext"\n[output]\npath = "{root}/checkpoint"\n'
        '[workers]\nexecutor = "local"\n[check]\nmemory = "512MiB"\nlengths = [64, 80]\n'
    )
    subprocess.run([*SHARDCONV, "run", str(config), "--check", "none"], check=True)
    return config


def peak_of(command: list[str]) -> tuple[int, int, float]:
    """Exit code, the largest sum of resident bytes over the tree of processes, and seconds of a command."""
    start, peak = time.perf_counter(), 0
    process = psutil.Popen(command)
    while process.poll() is None:
        peak = max(peak, sum(_resident(one) for one in _tree(process)))
        time.sleep(0.1)
    return process.returncode, peak, time.perf_counter() - start


def _tree(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def main() -> int:
    """Makes, converts, checks and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--limit", type=float, default=3.0, help="GB, 10**9 bytes")
    parser.add_argument("--keep", action="store_true", help="keep the files, and use those that are there")
    chosen = parser.parse_args()
    root: Path = chosen.root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    try:
        config = root / "big.toml"
        if not (chosen.keep and (root / "checkpoint").exists()):
            config = make(root, chosen.layers)
        code, peak, seconds = peak_of([*SHARDCONV, "verify", str(config), "--check", "logits"])
    finally:
        if not chosen.keep:
            shutil.rmtree(root)
    print(f"exit code {code}; {seconds:.0f} s; at most {peak / 1e9:.2f} GB of {chosen.limit} GB in all processes")
    return int(code != 0 or peak > chosen.limit * 1e9)


if __name__ == "__main__":
    sys.exit(main())
