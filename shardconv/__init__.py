"""shardconv: PyTorch and safetensors checkpoints into sharded Orbax checkpoints, in bounded memory."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# What is offered here and lives above, loaded when asked for: this package is imported by everything, and loads nothing itself.
OFFERED = {
    "convert_module": "shardconv.porting.convert",
    "j2t": "shardconv.interop",
    "load": "shardconv.mesh.loading",
    "load_module": "shardconv.porting.saving",
    "plan_load": "shardconv.mesh.loading",
    "propose_mapping": "shardconv.porting.convert",
    "save_module": "shardconv.porting.saving",
    "t2j": "shardconv.interop",
    "torch_in_jax": "shardconv.interop",
}


def __getattr__(name: str) -> Any:
    if name not in OFFERED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(OFFERED[name]), name)
