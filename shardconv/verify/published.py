"""The source's tensors as torch tensors, block by block: which there are is known at once, and values are read when a block is asked for.

A tensor belongs to block n where its name says `layers.n.` or `h.n.`, as published decoders name their blocks; all others are of the ends.
Files are those that transformers would load: what an index lists, or one file, safetensors before pickles. Where there are none, those of
the source: a PyTorch file of another name, or of a training run, with its state dict under a key and a wrapper's marks in the names.
"""

import json
import os
import re
from collections.abc import Sequence
from typing import Any

from shardconv.errors import InputError, Problem
from shardconv.verify.torch_files import bare

BLOCK = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")
NAMES = ("model.safetensors", "pytorch_model.bin")


class Published:
    """A checkpoint's directory. `blocks` are the numbers of the blocks that it has tensors of."""

    def __init__(self, path: str, source: Sequence[str] = (), prefix: str = "") -> None:
        self.path, self._prefix = path, prefix
        self._files: dict[str, str] = {}
        homes, files = _files(path, source)
        for file in files:
            for key in self._keys(os.path.join(path, file)):
                if homes.get(key, file) == file:
                    self._files[key] = file
        self._blocks: dict[int | None, list[str]] = {}
        for key in self._files:
            found = BLOCK.search(key)
            self._blocks.setdefault(int(found[1]) if found else None, []).append(key)
        self.blocks = sorted(number for number in self._blocks if number is not None)

    def tensors(self, block: int | None) -> dict[str, Any]:
        """The tensors of a block, or of the ends, by name. They may be views of mapped files: what is dropped is unmapped."""
        keys = self._blocks.get(block, [])
        found: dict[str, Any] = {}
        for file in sorted({self._files[key] for key in keys}):
            found.update(self._read(os.path.join(self.path, file), [key for key in keys if self._files[key] == file]))
        return found

    def _keys(self, file: str) -> list[str]:
        if not file.endswith(".safetensors"):
            return list(_unpickled(file, self._prefix))
        from safetensors import safe_open

        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())

    def _read(self, file: str, keys: list[str]) -> dict[str, Any]:
        if not file.endswith(".safetensors"):
            stored = _unpickled(file, self._prefix)
            return {key: stored[key] for key in keys}
        from safetensors import safe_open

        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in keys}


def renumbered(key: str, number: int) -> str:
    """The name that a block's tensor has in block `number`.

    >>> renumbered("model.layers.31.mlp.experts.2.w1.weight", 0)
    'model.layers.0.mlp.experts.2.w1.weight'
    """
    found = BLOCK.search(key)
    return key if found is None else f"{key[: found.start(1)]}{number}{key[found.end(1) :]}"


def _files(path: str, source: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Which file has each tensor, where an index says so, and all files."""
    for name in NAMES:
        if os.path.exists(os.path.join(path, f"{name}.index.json")):
            with open(os.path.join(path, f"{name}.index.json"), encoding="utf-8") as file:
                homes: dict[str, str] = json.load(file)["weight_map"]
            return homes, sorted(set(homes.values()))
        if os.path.exists(os.path.join(path, name)):
            return {}, [name]
    files = sorted(name for name in os.listdir(path) if name.endswith(".safetensors")) or list(source)
    if not files:
        raise InputError("the PyTorch model cannot be made", [Problem(f"{path} has no weights that transformers would load")])
    return {}, files


def _unpickled(file: str, prefix: str) -> dict[str, Any]:
    """Tensors of a PyTorch file by the names that the bare model has, mapped where its format allows."""
    import torch

    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # files of torch before 1.6 cannot be mapped
        found = torch.load(file, map_location="cpu", weights_only=True)
    return bare(found, prefix, torch.Tensor)
