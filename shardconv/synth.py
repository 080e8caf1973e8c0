"""Checkpoints made on the spot: random weights, or headers only, from a model's config.json.

Names and shapes are the family's, as published checkpoints have them, split over files with an index. Random weights are seeded tensor by
tensor, so the same seed gives the same bytes whatever the file size, and no two tensors are alike: a conversion that mixes two up shows.
Headers only, files have their full length and take no space, which is all that planning and listing read: a 671B model is 11 MB.
"""

import hashlib
import json
import os
from collections.abc import Iterator

import numpy as np

from shardconv.coverage import TIED
from shardconv.dtypes import DType, dtype_named, dtype_of_code, raw_view
from shardconv.errors import ConfigError, InputError, Problem
from shardconv.families import find
from shardconv.family import Model, bind
from shardconv.formats.writing import NewTensor, write_checkpoint
from shardconv.values import is_float

# Elements made at a time: 16 MiB of float32.
BLOCK = 1 << 22

# The standard deviation that most of these models are initialised with (`initializer_range` in their config.json).
SPREAD = np.float32(0.02)


def synthesise(hf_config: str, out: str, *, sparse: bool, seed: int, dtype: str, shard_bytes: int) -> tuple[int, int]:
    """Writes a checkpoint of a config.json (or of the directory that holds one) into the new directory `out`: (files, their bytes).

    Raises InputError where no family describes the config, ConfigError where `out` is not empty or the dtype is no float.
    """
    path = os.path.join(hf_config, "config.json") if os.path.isdir(hf_config) else hf_config
    stored = _float_named(dtype)
    config = _read(path)
    model = bind(find(config), config)
    if os.path.isdir(out) and os.listdir(out):
        raise ConfigError("cannot write the checkpoint", [Problem(f"{out} is not empty", "choose a new directory")])
    os.makedirs(out, exist_ok=True)
    blocks = None if sparse else lambda tensor: random_blocks(tensor, seed)
    tensors = sorted(_tensors(model, stored), key=_natural)
    files = write_checkpoint(out, tensors, blocks, max_file_bytes=shard_bytes, metadata={"format": "pt"})
    with open(os.path.join(out, "config.json"), "w", encoding="utf-8") as file:
        json.dump({**config, "torch_dtype": stored.name}, file, indent=2)
    return len(files), sum(os.path.getsize(os.path.join(out, name)) for name in files)


def _read(path: str) -> dict[str, object]:
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError) as error:
        remedy = "give a config.json, or a directory with one"
        raise InputError("cannot read the model's config", [Problem(f"{path}: {error}", remedy)]) from None
    if not isinstance(config, dict):
        raise InputError("cannot read the model's config", [Problem(f"{path} is not a JSON object")])
    return config


def _float_named(name: str) -> DType:
    try:
        dtype = dtype_named(name)
    except KeyError:
        dtype = None
    if dtype is None or not is_float(dtype) or dtype.bits < 8:
        expected = 'expected a float, such as "bfloat16" or "float32"'
        raise ConfigError("cannot write the checkpoint", [Problem(f'--dtype "{name}"', expected)])
    return dtype


def _tensors(model: Model, stored: DType) -> Iterator[NewTensor]:
    for param in model.params:
        if not (model.says_tied and param.name == TIED):
            address = param.address(model.axes)
            for key, _ in address.keys():
                yield NewTensor(key, stored.code, address.shape)


def _natural(tensor: NewTensor) -> list[tuple[int, str]]:
    """Layer 2 before layer 10, as published checkpoints are ordered."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in tensor.name.split(".")]


def random_blocks(tensor: NewTensor, seed: int) -> Iterator[memoryview]:
    """The bytes of a tensor of random weights: normal around 0, or around 1 for one of one dim (a norm)."""
    digest = hashlib.blake2b(f"{seed}\0{tensor.name}".encode(), digest_size=16).digest()
    random = np.random.Generator(np.random.SFC64(int.from_bytes(digest, "little")))
    size = int(np.prod(tensor.shape, dtype=np.int64))
    dtype = dtype_of_code(tensor.dtype).numpy
    for start in range(0, size, BLOCK):
        values = random.standard_normal(min(BLOCK, size - start), dtype=np.float32) * SPREAD
        if len(tensor.shape) == 1:
            values += np.float32(1)
        yield raw_view(values.astype(dtype)).data.cast("B")
