"""The tables of docs/scaling.md: what a 70B and a 671B model take on many hosts, by the plans that a run would follow.

    python scripts/scaling.py [--read 1.0] [--write 1.0]

Bandwidths are GB/s per host. Nothing is converted: the sources are headers of random models, files of full length that take no space.
"""

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from shardconv.config import load_config
from shardconv.plan import Plan, plan_from_json
from shardconv.planning import plan_from_config
from shardconv.report import files_to_write
from shardconv.scaling import Bandwidths, Projection, dealt, placed
from shardconv.synth import synthesise

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
# A mixture of experts as large as DeepSeek-V3, in a family that there is.
LARGE = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 7168, "moe_intermediate_size": 2048,
    "intermediate_size": 18432, "num_hidden_layers": 58, "num_attention_heads": 128, "num_key_value_heads": 8, "head_dim": 128,
    "num_experts": 256, "num_experts_per_tok": 8, "norm_topk_prob": True, "vocab_size": 129280, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A model on some hosts: devices of each host are a row of the mesh."""

    name: str
    model: dict[str, object]
    hosts: int
    mesh: str
    budget: str
    slots: int


FSDP_TENSOR = """{ fsdp = 16, tensor = 4 }
rules = { embed = "fsdp", heads = "tensor", kv_heads = "tensor", mlp = "tensor", vocab = "tensor" }"""
FSDP_EXPERT = """{ fsdp = 8, expert = 32 }
rules = { embed = "fsdp", experts = "expert", vocab = "expert" }"""
JOBS = (
    Job("70B on v5p-128", LLAMA, 16, FSDP_TENSOR, "8GiB", 8),
    Job("671B on 64 hosts", LARGE, 64, FSDP_EXPERT, "16GiB", 8),
)


@dataclass(frozen=True)
class Row:
    """One way of doing a job."""

    job: Job
    way: str
    plan: Plan
    seconds: float
    load_seconds: float
    projection: Projection


GIGABYTE_PER_SECOND = Bandwidths(1e9, 1e9)


def rows(job: Job, folder: Path, bandwidths: Bandwidths) -> list[Row]:
    """A job that streams, and on the mesh."""
    (folder / "config.json").write_text(json.dumps(job.model))
    source = folder / "source"
    synthesise(str(folder / "config.json"), str(source), sparse=True, seed=0, dtype="bfloat16", shard_bytes=5_000_000_000)
    found = []
    for placement in ("stream", "mesh"):
        text = (
            f'[source]\npath = "{source}"\n[target]\nlayout = "maxtext"\n[output]\npath = "{folder}/out"\n'
            f'[mesh]\nplacement = "{placement}"\nprocesses = {job.hosts}\naxes = {job.mesh}\n[workers]\nmemory_budget = "{job.budget}"\n'
        )
        (folder / "run.toml").write_text(text)
        begun = time.perf_counter()
        plan = plan_from_config(load_config(str(folder / "run.toml")))
        planned = time.perf_counter() - begun
        data = plan.to_json()
        begun = time.perf_counter()
        plan_from_json(data)
        loaded = time.perf_counter() - begun
        projection = placed(plan, bandwidths) if plan.windows else dealt(plan, job.hosts, job.slots, bandwidths)
        found.append(Row(job, placement, plan, planned, loaded, projection))
    return found


def line(row: Row) -> str:
    """A row of the table, without what a clock has measured."""
    plan, projection = row.plan, row.projection
    cells = (
        row.job.name,
        row.way,
        f"{plan.target_bytes / 1e9:,.0f} GB",
        f"{max(projection.read) / 1e9:.2f} GB",
        f"{max(projection.written) / 1e9:.2f} GB",
        f"{sum(projection.read) / plan.target_bytes:.2f}",
        f"{projection.balance:.3f}",
        f"{len(plan.units):,}",
        f"{len(plan.windows) or '-'}",
        f"{files_to_write(plan, ocdbt=True):,}",
        f"{plan.peak_bytes / 1e9:.2f} GB",
        f"{projection.seconds:.0f} s",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--read", type=float, default=1.0, help="GB/s per host from the source")
    parser.add_argument("--write", type=float, default=1.0, help="GB/s per host to the output")
    options = parser.parse_args()
    bandwidths = Bandwidths(options.read * 1e9, options.write * 1e9)
    for job in JOBS:
        with tempfile.TemporaryDirectory() as folder:
            for row in rows(job, Path(folder), bandwidths):
                print(line(row), f"  planned in {row.seconds:.2f} s, loaded by a worker in {row.load_seconds:.3f} s", flush=True)


if __name__ == "__main__":
    main()
