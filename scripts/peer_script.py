"""What people write by hand: safetensors, jnp, one Orbax save. The peer of `scripts/benchmark.py`, not part of shardconv.

    python scripts/peer_script.py SOURCE OUT
"""

import glob
import json
import os
import sys

import jax.numpy as jnp
import orbax.checkpoint as ocp
from safetensors import safe_open


def main(source: str, out: str) -> None:
    """Converts a Llama checkpoint, layers stacked on axis 1, everything in memory."""
    with open(os.path.join(source, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    state = {}
    for path in sorted(glob.glob(os.path.join(source, "*.safetensors"))):
        with safe_open(path, framework="flax") as tensors:
            for key in tensors.keys():
                state[key] = tensors.get_tensor(key)

    def stack(name: str, transform):
        return jnp.stack([transform(state.pop(f"model.layers.{i}.{name}.weight")) for i in range(layers)], axis=1)

    tree = {
        "embed": state.pop("model.embed_tokens.weight"),
        "final_norm": state.pop("model.norm.weight"),
        "layers": {
            "attn_norm": stack("input_layernorm", lambda x: x),
            "mlp_norm": stack("post_attention_layernorm", lambda x: x),
            "q": stack("self_attn.q_proj", lambda x: x.T.reshape(x.shape[1], -1, dim)),
            "k": stack("self_attn.k_proj", lambda x: x.T.reshape(x.shape[1], -1, dim)),
            "v": stack("self_attn.v_proj", lambda x: x.T.reshape(x.shape[1], -1, dim)),
            "o": stack("self_attn.o_proj", lambda x: x.T.reshape(-1, dim, x.shape[0])),
            "gate": stack("mlp.gate_proj", lambda x: x.T),
            "up": stack("mlp.up_proj", lambda x: x.T),
            "down": stack("mlp.down_proj", lambda x: x.T),
        },
    }
    ocp.StandardCheckpointer().save(os.path.abspath(out), tree)
    ocp.StandardCheckpointer().wait_until_finished()


if __name__ == "__main__":
    main(*sys.argv[1:])
