"""shardconv: PyTorch and safetensors checkpoints into sharded Orbax checkpoints, in bounded memory."""

__version__ = "0.1.0"
