"""What a layout should hold, found another way: whole tensors and the steps of the tables in `data/`; nothing of shardconv is used.

A step moves or changes one stored tensor: `T`, `reshape D N H`, `rope_interleave`, `zero-pad rows to V`, `+1`, `* h^-0.5` and so on. Then
experts are stacked, then layers. Values are computed in float32 and rounded once, by torch where it is installed.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

try:
    import torch
except ImportError:
    torch = None

Config = Mapping[str, Any]
Tensors = Mapping[str, np.ndarray]

DATA = Path(__file__).parent / "data"
MAXTEXT = json.loads((DATA / "maxtext.json").read_text())
FLAT = json.loads((DATA / "flat.json").read_text())


@dataclass(frozen=True)
class Row:
    """One leaf of a table: its names, its shape of one layer in symbols, the tensor and the steps. `stack` is the axis for layers."""

    scanned: str
    unscanned: str
    shape: str
    tensor: str
    steps: tuple[str, ...]
    stack: int
    count: str  # how many layers are stacked, in symbols; empty for a leaf that no layer has

    def shape_in(self, symbols: Mapping[str, int], scan: bool) -> tuple[int, ...]:
        shape = [symbols[symbol] for symbol in self.shape.split()]
        if self.count and scan:
            shape.insert(self.stack, symbols[self.count])
        return tuple(shape)


def rows(layout: str, config: Config, rope: str) -> list[Row]:
    """The table of a model in a layout, with rotary dims in halves or interleaved."""
    found = list(_maxtext(config["model_type"]) if layout == "maxtext" else _flat(config))
    return [_rotated(row, rope) for row in found]


def _maxtext(family: str) -> Iterator[Row]:
    for leaf, scanned, shape, tensor, steps in MAXTEXT[family]:
        name = "params.params." + leaf.replace("/", ".")
        count = next((symbol for symbol in scanned.split() if symbol.startswith("L")), "")
        if count:
            assert scanned.split()[1] == count
        yield Row(name, name.replace("decoder.layers.", "decoder.layers_{i}."), shape, tensor, tuple(steps), 1, count)


def _flat(config: Config) -> Iterator[Row]:
    groups = list(FLAT["families"][config["model_type"]])
    if config.get("attention_bias") and config.get("mlp_bias"):
        groups += ["query, key and value biases", "output and mlp biases"]
    for group in groups:
        for name, shape, tensor, steps in FLAT["groups"][group]:
            count = "L" if name.startswith("layers.") else ""
            yield Row(name, name.replace("layers.", "layers.{i}."), shape, tensor, tuple(steps), 0, count)


def _rotated(row: Row, rope: str) -> Row:
    """Interleaved, all that is rotated is reordered, in any family; in halves, nothing is."""
    steps = [step for step in row.steps if step != "rope_interleave"]
    if rope == "interleaved" and re.search(r"\.(q|k)_(proj|norm)\.", row.tensor):
        place = next((n for n, step in enumerate(steps) if step.startswith("*")), len(steps))
        steps.insert(place, "rope_interleave")
    return Row(row.scanned, row.unscanned, row.shape, row.tensor, tuple(steps), row.stack, row.count)


def symbols(config: Config, vocab: int = 0) -> dict[str, int]:
    """The sizes that the tables' symbols stand for; `vocab` is the padded vocabulary."""
    heads = config["num_attention_heads"]
    layers = config["num_hidden_layers"]
    return {
        "D": config["hidden_size"],
        "F": config["intermediate_size"],
        "Fe": config.get("moe_intermediate_size", 0),
        "L": layers,
        "L/2": layers // 2,
        "N": heads,
        "K": config.get("num_key_value_heads") or heads,
        "H": config.get("head_dim") or config["hidden_size"] // heads,
        "V": vocab or config["vocab_size"],
        "X": config.get("num_experts") or config.get("num_local_experts") or 0,
    }


def stored_shapes(table: list[Row], config: Config, tied: bool) -> dict[str, tuple[int, ...]]:
    """The tensors that a table is made of, with their shapes: its steps, the other way."""
    sizes = symbols(config)
    found = {}
    for row in table:
        shape = [sizes[symbol] for symbol in row.shape.split()]
        if "{e}" in row.tensor:
            shape = shape[1:]
        if any(step.startswith("reshape") for step in row.steps):  # (N, H, D) was (N H, D), (D, N, H) was (D, N H), (N, H) was (N H)
            first = 0 if row.shape.startswith(("N", "K")) else 1
            shape[first : first + 2] = [shape[first] * shape[first + 1]]
        if "T" in row.steps:
            shape = shape[::-1]
        if not (tied and row.tensor == "lm_head.weight"):
            found |= {key: tuple(shape) for layer in _keys(row, sizes) for key in layer}
    return found


def _keys(row: Row, sizes: Mapping[str, int]) -> list[list[str]]:
    """The tensors of a leaf: for each of its layers those of its experts."""
    layers = range(sizes[row.count] if row.count else 1)
    experts = range(sizes["X"] if "{e}" in row.tensor else 1)
    return [[_key(row.tensor, layer, expert) for expert in experts] for layer in layers]


def _key(tensor: str, layer: int, expert: int) -> str:
    def number(found: re.Match[str]) -> str:
        return str(int(found[1] or 1) * layer + int(found[2] or 0))

    return re.sub(r"\{(\d*)i(?:\+(\d+))?\}", number, tensor).replace("{e}", str(expert))


def leaves(table: list[Row], config: Config, scan: bool, vocab: int, tied: bool) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Every leaf of the target, with its shape, and whether its values are moved and not changed."""
    sizes = symbols(config, vocab)
    found = {}
    for row in table:
        if not (tied and row.tensor == "lm_head.weight"):
            for name in _names(row, scan, sizes):
                found[name] = (row.shape_in(sizes, scan), not any(step.startswith(("*", "+")) for step in row.steps))
    return found


def _names(row: Row, scan: bool, sizes: Mapping[str, int]) -> list[str]:
    if scan or not row.count:
        return [row.scanned]
    return [row.unscanned.replace("{i}", str(i)) for i in range(sizes[row.count])]


def values(table: list[Row], config: Config, tensors: Tensors, scan: bool, vocab: int, dtype: str) -> dict[str, np.ndarray]:
    """Every leaf of the target, as an array of `dtype`; "source" is each tensor's own."""
    sizes = symbols(config, vocab)
    found = {}
    for row in table:
        if row.tensor == "lm_head.weight" and row.tensor not in tensors:
            continue
        layers = []
        for keys in _keys(row, sizes):
            parts = [cast(_stepped(tensors[key], row.steps, sizes, config, dtype), dtype, tensors[key].dtype) for key in keys]
            layers.append(np.stack(parts, axis=0) if "{e}" in row.tensor else parts[0])
        if scan and row.count:
            layers = [np.stack(layers, axis=row.stack)]
        found |= dict(zip(_names(row, scan, sizes), layers, strict=True))
    return found


def _stepped(
    tensor: np.ndarray, steps: tuple[str, ...], sizes: Mapping[str, int], config: Config, dtype: str
) -> np.ndarray:
    wide = np.float64 if tensor.dtype == np.float64 and dtype == "source" else np.float32
    for step in steps:
        if step == "T":
            tensor = tensor.T
        elif step.startswith("reshape "):
            tensor = tensor.reshape([sizes[symbol] for symbol in step.split()[1:]])
        elif step == "rope_interleave":
            halves, half = tensor, sizes["H"] // 2
            tensor = np.empty_like(halves, order="C")
            tensor[..., 0::2], tensor[..., 1::2] = halves[..., :half], halves[..., half:]
        elif step == "zero-pad rows to V":
            tensor = np.concatenate([tensor, np.zeros((sizes["V"] - len(tensor), *tensor.shape[1:]), tensor.dtype)])
        elif step == "+1":
            tensor = tensor.astype(wide) + wide(1)
        elif step == "* h^-0.5":
            tensor = tensor.astype(wide) * wide(sizes["H"] ** -0.5)
        elif step == "* query_pre_attn_scalar^-0.5":
            tensor = tensor.astype(wide) * wide(config["query_pre_attn_scalar"] ** -0.5)
        elif step == "* sqrt(D)":
            tensor = tensor.astype(wide) * wide(sizes["D"] ** 0.5)
        else:
            raise ValueError(step)
    return tensor


def cast(array: np.ndarray, dtype: str, own: np.dtype) -> np.ndarray:
    """The array in another dtype, by torch's casts."""
    name = own.name if dtype == "source" else dtype
    target = np.dtype(getattr(ml_dtypes, name, name))
    if torch is None or array.dtype == target:
        with np.errstate(all="ignore"):
            if name == "float8_e4m3fn":
                array = array.astype(np.float32).clip(-448, 448)  # torch saturates, ml_dtypes does not
            return array.astype(target)
    raw = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}
    plain = np.ascontiguousarray(array)
    given = torch.from_numpy(plain.view(raw[plain.itemsize])).view(getattr(torch, array.dtype.name))
    done = given.to(getattr(torch, name)).view(getattr(torch, np.dtype(raw[target.itemsize]).name))
    return done.numpy().view(target).reshape(array.shape)
