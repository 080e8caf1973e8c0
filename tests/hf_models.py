"""Models in the Hugging Face style for tests: published configs, small versions of them, and checkpoints of both.

`data/names.json` has the tensors that transformers saves of a model of each config in `data/configs`. Tests compare families with it, so
they need no torch; where torch is installed, `test_families` compares it with transformers. To write it anew: `python tests/hf_models.py`.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardconv.dtypes import dtype_of_code
from shardconv.formats import SourceFile, StoredTensor
from shardconv.source import Source

Config = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]

DATA = Path(__file__).parent / "data"
CONFIGS: dict[str, Config] = {path.stem: json.loads(path.read_text()) for path in sorted((DATA / "configs").glob("*.json"))}

# One config of each family, by the family's name, which is transformers' name of the model type.
ONE_EACH = {config["model_type"]: name for name, config in reversed(CONFIGS.items()) if not name.startswith("biased")}


def small(name: str, **changes: object) -> Config:
    """A published config in sizes that all differ, so that what mixes up two axes shows; head_dim is not hidden_size / heads."""
    sizes: Config = {
        "hidden_size": 24,
        "intermediate_size": 20,
        "moe_intermediate_size": 10,
        "num_hidden_layers": 4,
        "max_window_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 37,
        "num_local_experts": 3,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "query_pre_attn_scalar": 36,
        "max_position_embeddings": 64,
    }
    config = CONFIGS[name]
    return {**config, **{key: size for key, size in sizes.items() if key in config}, "head_dim": 8, **changes}


def templates(shapes: Shapes) -> dict[str, list[Any]]:
    """Tensors whose names differ in nothing but numbers as one: how many there are, and their shape."""
    found: dict[str, list[Any]] = {}
    for key, shape in shapes.items():
        row = found.setdefault(re.sub(r"\.[0-9]+(?=\.)", ".{}", key), [0, list(shape)])
        assert row[1] == list(shape), f"{key} is {shape}, others like it are {row[1]}"
        row[0] += 1
    return found


def header_only(shapes: Shapes, config: Config, dtypes: str | Mapping[str, str] = "BF16") -> Source:
    """A source as it would be read from one file with these tensors, of one dtype or of one each; there is no such file."""
    tensors, offset = {}, 0
    for key, shape in shapes.items():
        code = dtypes if isinstance(dtypes, str) else dtypes[key]
        nbytes = math.prod(shape) * dtype_of_code(code).bits // 8
        tensors[key] = StoredTensor(key, "model.safetensors", code, tuple(shape), offset, nbytes)
        offset += nbytes
    files = {"model.safetensors": SourceFile("model.safetensors", offset, 0, "")}
    return Source("/nowhere", "safetensors", tensors, files, config, ())


def saved_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The tensors that transformers would save of a model; no weights are made."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    settings = AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    tied = set(model._tied_weights_keys) if settings.tie_word_embeddings else set()
    saved = revert_weight_conversion(model, {key: tensor for key, tensor in model.state_dict().items() if key not in tied})
    return {key: tuple(tensor.shape) for key, tensor in saved.items()}


def save_random(config: Config, directory: Path, dtype: str) -> None:
    """A checkpoint of random weights in several files, written by transformers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    with torch.no_grad():
        for weight in model.parameters():  # norms are made as ones and biases as zeros, which would hide mistakes
            weight.copy_(torch.randn(weight.shape))
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size="5KB")


def _names_json() -> str:
    lines = []
    for name, config in CONFIGS.items():
        rows = sorted(templates(saved_shapes(config)).items())
        body = ",\n".join(f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in rows)
        lines.append(f' "{name}": {{\n{body}\n }}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    (DATA / "names.json").write_text(_names_json())
