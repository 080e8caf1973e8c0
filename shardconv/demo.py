"""The main job on a model made on the spot: `python -m shardconv.demo build/demo`, which is what `make demo` runs.

A Llama checkpoint of 1 GB, in several safetensors files of random weights, becomes a sharded Orbax checkpoint through Ray workers: the
plan, the run, and the result restored by plain Orbax onto a mesh of eight CPU devices. Each step prints the command a user would type.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys

# H2O-Danube3-500M, the published Llama-architecture config that is nearest to 1 GB in bfloat16 (0.51 billion parameters).
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 96,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-05,
    "rope_theta": 100000,
    "tie_word_embeddings": False,
}

CONFIG = """\
# What `make demo` converts: python -m shardconv run {root}/demo.toml --overwrite
[source]
path = "{root}/source"

[target]
layout = "flat"

[mesh]                     # the devices that will restore it
axes = {{ fsdp = 4, tensor = 2 }}
rules = {{ embed = "fsdp", vocab = "tensor", heads = "tensor", kv_heads = "tensor", mlp = "tensor" }}

[output]
path = "{root}/checkpoint"
"""

RESTORE = """\
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import jax, orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

checkpointer = ocp.StandardCheckpointer()
found = checkpointer.metadata({path!r})
mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
specs = {{key: PartitionSpec(*spec) for key, spec in found.custom_metadata["shardconv"]["partition_specs"].items()}}
target = jax.tree_util.tree_map_with_path(
    lambda path, leaf: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, specs[".".join(step.key for step in path)])
    ),
    found.item_metadata.tree,
)
gate = checkpointer.restore({path!r}, target)["layers"]["mlp"]["gate"]
print("restored onto 8 devices: layers.mlp.gate is", gate.shape, gate.dtype, gate.sharding.spec)
"""


def main(root: str) -> int:
    """Runs the demo under `root`; returns the exit code of the first command that fails."""
    os.makedirs(root, exist_ok=True)
    source = os.path.join(root, "source")
    for name, text in (("model.json", json.dumps(MODEL, indent=2) + "\n"), ("demo.toml", CONFIG.format(root=root))):
        with open(os.path.join(root, name), "w", encoding="utf-8") as file:
            file.write(text)
    commands = [["plan", f"{root}/demo.toml"], ["run", f"{root}/demo.toml", "--overwrite"]]
    if not os.path.isfile(os.path.join(source, "config.json")):
        shutil.rmtree(source, ignore_errors=True)
        commands.insert(0, ["synth", f"{root}/model.json", source, "--shard-size", "300MB"])
    for command in commands:
        if code := _say(["shardconv", *command], [sys.executable, "-m", "shardconv", *command]):
            return code
    script = os.path.join(root, "restore.py")
    with open(script, "w", encoding="utf-8") as file:
        file.write(RESTORE.format(path=os.path.abspath(os.path.join(root, "checkpoint"))))
    return _say(["python", script], [sys.executable, script])


def _say(shown: list[str], command: list[str]) -> int:
    sys.stdout.write(f"\n$ {shlex.join(shown)}\n")
    sys.stdout.flush()
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
