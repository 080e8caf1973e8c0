"""The torch side: tiny models of random weights, the logits transformers computes with them, and a shardconv config for every case.

    python make_models.py BUILD      ->  BUILD/models/NAME/, BUILD/logits/NAME.npz, BUILD/configs/CASE.toml

Every tensor is random: the norms too, which transformers starts at one, and the biases, which it starts at zero. Weights are float32 that
bfloat16 cannot hold, but for the embedding of a tied model: MaxText rounds that to bfloat16 when it makes logits of it, always.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import transformers
from cases import BATCH, MODELS, TOKENS, Case, cases


def main(build: Path) -> None:
    """Makes all of it."""
    transformers.utils.logging.disable_progress_bar()
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, 500, (BATCH, TOKENS)))
    for folder in ("models", "logits", "configs"):
        (build / folder).mkdir(parents=True, exist_ok=True)
    for name, (kind, config) in MODELS.items():
        model = random_model(name, kind, dict(config))
        with torch.no_grad():
            logits = model(tokens).logits.float().numpy()
        np.savez(build / f"logits/{name}.npz", tokens=tokens.numpy(), logits=logits)
        save(name, model, build / f"models/{name}")
        sys.stdout.write(f"{name}: logits {logits.shape}, largest {abs(logits).max():.1f}\n")
    for case in cases():
        (build / f"configs/{case.name}.toml").write_text(shardconv_config(case, build))


def random_model(name: str, kind: str, config: dict[str, object]) -> torch.nn.Module:
    """A model in float32 whose attention looks at some tokens more than at others, with all tensors random."""
    torch.manual_seed(0)
    family = getattr(transformers, kind)
    model = family._from_config(family.config_class(**config, attn_implementation="eager"), dtype=torch.float32).eval()
    norm = 0.0 if kind.startswith("Gemma") else 1.0
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if "norm" in key:
                parameter.copy_(norm + 0.2 * noise)
            elif key.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(parameter.shape[-1] ** -0.5 * noise)
            if name.endswith("-bf16") or ("embed_tokens" in key and config["tie_word_embeddings"]):
                parameter.copy_(parameter.bfloat16().float())
    return model


def save(name: str, model: torch.nn.Module, path: Path) -> None:
    """Saves it as it is computed with, in float32, but "-bf16", and "-unscaled": as if nobody had scaled its queries."""
    if name.endswith("-bf16"):
        model = model.bfloat16()
    if name == "llama-unscaled":
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.q_proj.weight *= model.config.head_dim**0.5  # undoes what MaxText's layout folds in
    model.save_pretrained(path)


def shardconv_config(case: Case, build: Path) -> str:
    """The TOML that converts a case."""
    target = {"layout": "maxtext", "scan_layers": case.scan, **case.target}
    sections = {
        "source": {"path": str(build / f"models/{case.model}")},
        "target": target,
        "mesh": case.mesh,
        "output": {"path": str(build / f"out/{case.name}"), **case.output},
        "workers": {"executor": "local", "count": 1},
    }
    lines = []
    for section, values in sections.items():
        lines += [f"[{section}]", *(f"{key} = {toml(value)}" for key, value in values.items()), ""]
    return "\n".join(lines)


def toml(value: object) -> str:
    """A value as TOML has it."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
