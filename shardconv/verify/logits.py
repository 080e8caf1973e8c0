"""Do both sides think the same? The logits of the written checkpoint, in JAX, against those of the PyTorch model, of the source files.

The checkpoint is restored by Orbax onto a mesh, and `shardconv.models` reads it as its layout's code would; the reference is transformers'
own model. Sequences of token ids go one by one through both, so that logits of one sequence are held at a time; `agreement` judges.
"""

import json
import os
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from shardconv.errors import InputError, Problem
from shardconv.models.decoder import Weights, logits, weights_of
from shardconv.models.hf import decoder_of
from shardconv.models.reading import read
from shardconv.verify.agreement import LogitReport, compare, measure
from shardconv.verify.differences import Logits, Tokens
from shardconv.verify.logit_request import LENGTHS, Bounds, Rounding
from shardconv.verify.reference import load_reference
from shardconv.verify.restoring import restore


def check_logits(
    checkpoint: str,
    source: str,
    sample: Sequence[Tokens],
    *,
    rope: str,
    roundings: Mapping[str, Rounding],
    bounds: Bounds,
    devices: Sequence[jax.Device],
) -> LogitReport:
    """Restores the tree at `checkpoint` onto devices and compares its logits with those of the PyTorch model in the directory `source`.

    `rope` is the target's order of rotary dims as asked for ("auto" where the layout's code decides), `roundings` those of tensors whose
    values the plan does not keep (`roundings.roundings`). Raises ConfigError where torch or a forward for the model is missing,
    CheckError where the layout's code could not read the checkpoint.
    """
    weights = restored_weights(checkpoint, hf_config(source), rope, devices)
    reference = load_reference(source)
    longest = max(len(tokens) for tokens in sample)
    measured = (measure(reference, tokens, roundings) for tokens in sample)
    return compare(measured, lambda tokens: forward(weights, tokens, longest), bounds)


def random_sample(vocab: int, seed: int, lengths: Sequence[int] = LENGTHS) -> tuple[Tokens, ...]:
    """Seeded random token ids, one sequence of each length."""
    numbers = np.random.default_rng(seed)
    return tuple(numbers.integers(0, vocab, length, dtype=np.int64) for length in lengths)


def prompt_sample(path: str, source: str) -> tuple[Tokens, ...]:
    """The lines of a text file as token ids, by the source's own tokenizer; raises InputError without one, or without lines."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
        with open(path, encoding="utf-8") as file:
            lines = [line for line in file.read().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError("the prompts cannot be read", [Problem(str(error).splitlines()[0])]) from None
    sample = tuple(np.asarray(tokenizer(line)["input_ids"], dtype=np.int64) for line in lines)
    if not sample:
        raise InputError("the prompts cannot be read", [Problem(f"{path} has no lines")])
    return sample


def hf_config(source: str) -> dict[str, object]:
    """The config.json of a checkpoint's directory; raises InputError."""
    try:
        with open(os.path.join(source, "config.json"), encoding="utf-8") as file:
            config: dict[str, object] = json.load(file)
    except (OSError, ValueError) as error:
        raise InputError("the model's numbers are not known", [Problem(str(error), "put config.json beside the weights")]) from None
    return config


def restored_weights(checkpoint: str, config: dict[str, object], rope: str, devices: Sequence[jax.Device]) -> Weights:
    """The checkpoint on a mesh, as its layout's code reads it."""
    decoder = decoder_of(config)
    restored = restore(checkpoint, devices)
    layout, scanned = restored.metadata["shardconv"]["layout"], bool(restored.metadata["scan_layers"])
    return weights_of(read(layout, decoder, restored.leaves.keys(), scanned=scanned, rope=rope), restored.leaves)


def forward(weights: Weights, tokens: Tokens, length: int) -> Logits:
    """Logits (len(tokens), rows); padded behind to `length`, which a causal model does not see, so that all lengths compile once."""
    padded = np.pad(tokens, (0, length - len(tokens)))[None]
    return np.asarray(logits(weights, jnp.asarray(padded, jnp.int32)))[0, : len(tokens)]
