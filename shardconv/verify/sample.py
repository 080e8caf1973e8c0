"""What both sides are asked: sequences of token ids, random ones by a seed, and a user's own lines through the source's tokenizer."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shardconv.errors import InputError, Problem
from shardconv.verify.logit_request import LENGTHS

Tokens = npt.NDArray[np.int64]


def random_sample(vocab: int, seed: int, lengths: Sequence[int] = LENGTHS) -> tuple[Tokens, ...]:
    """Seeded random token ids, one sequence of each length."""
    numbers = np.random.default_rng(seed)
    return tuple(numbers.integers(0, vocab, length, dtype=np.int64) for length in lengths)


def prompt_lines(path: str) -> list[str]:
    """The lines of a text file that are not blank; raises OSError, and UnicodeDecodeError where it is no text in UTF-8."""
    with open(path, encoding="utf-8") as file:
        return [line for line in file.read().splitlines() if line.strip()]


def prompt_sample(path: str, source: str) -> tuple[Tokens, ...]:
    """The lines of a text file as token ids, by the source's own tokenizer; raises InputError without one, or without lines."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
        lines = prompt_lines(path)
    except (OSError, ValueError) as error:
        raise InputError("the prompts cannot be read", [Problem(str(error).splitlines()[0])]) from None
    sample = tuple(np.asarray(tokenizer(line)["input_ids"], dtype=np.int64) for line in lines)
    if not sample:
        raise InputError("the prompts cannot be read", [Problem(f"{path} has no lines")])
    return sample
