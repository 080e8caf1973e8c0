"""What both sides are asked: sequences of token ids, random ones by a seed, and a user's own lines through the source's tokenizer.

None is longer than config.json says that the model's positions are: a table of learned positions has no more rows.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from shardconv.errors import InputError, Problem
from shardconv.verify.logit_request import LENGTHS

Tokens = npt.NDArray[np.int64]

# What config.json calls the number of positions; the first that is there counts.
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")


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


def within(sample: Sequence[Tokens], config: Mapping[str, object]) -> tuple[tuple[Tokens, ...], str]:
    """The sequences, none longer than a config.json allows, and what is to be known of those that were cut: nothing where none was.

    >>> [len(tokens) for tokens in within((np.arange(40), np.arange(8)), {"n_positions": 32})[0]]
    [32, 8]
    """
    text = config.get("text_config")
    tables = [("text_config.", text)] if isinstance(text, Mapping) else []
    said = [(f"{prefix}{key}", table.get(key)) for prefix, table in [*tables, ("", config)] for key in POSITIONS]
    key, limit = next(((key, number) for key, number in said if type(number) is int and number > 0), ("", 0))
    if not limit or max(len(tokens) for tokens in sample) <= limit:
        return tuple(sample), ""
    note = f"sequences are cut to {limit} tokens, config.json's {key}: faults of position encodings beyond do not show"
    return tuple(tokens[:limit] for tokens in sample), note
