"""The PyTorch side: transformers' own model of the source files, walked through one block at a time, in all the runs that are wanted.

    embed -> block 0 -> block 1 -> ... -> final norm and output projection

A block is loaded from the source (`apart`), computes the next states of all sequences in every run (`noise`), and is dropped; what is kept
between blocks is states. Sequences are one batch, padded behind to the longest, which causal models do not see. The logits are made one
sequence at a time.

A weight that the files lack would be made up by transformers, and the comparison worthless: it is an error here.
"""

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from shardconv.errors import CheckError, ConfigError, InputError, Problem
from shardconv.user_code import said
from shardconv.verify import apart, noise
from shardconv.verify.logit_request import Rounding
from shardconv.verify.noise import HALF, ORDERS, PLAIN, ROUNDED, computing
from shardconv.verify.published import Published

Floats = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int64]
Parts = Mapping[str, Floats]
# For a state (sequences, length, embed) in front of a step, what the step's parts make of it in a run with rounded weights, by role.
Looker = Callable[[Floats, str], Parts]


def require_torch() -> None:
    """Raises ConfigError where torch or transformers is not installed."""
    absent = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if absent:
        said = f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed"
        remedy = 'pip install "shardconv[check]", or set check.mode = "weights"'
        raise ConfigError("comparing logits needs the PyTorch model", [Problem(said, remedy)])


@dataclass(frozen=True)
class Step:
    """What the model holds after a step, "embed" or "block 0" and so on: `states` by run, (sequences, length, embed).

    `scores` are the router's, by run, (sequences, length, experts); none without one. `parts` is for a trace of a block.
    """

    name: str
    states: Mapping[str, Floats]
    scores: Mapping[str, Floats]
    parts: Looker | None


@dataclass(frozen=True)
class Spoken:
    """The logits of one sequence, (length, vocab), by run."""

    tokens: Tokens
    logits: Mapping[str, Floats]


@dataclass(frozen=True)
class Reference:
    """A source to be walked through; `roundings` are those of the plan, by the source's names of tensors."""

    architecture: apart.Architecture
    published: Published
    roundings: Mapping[str, Rounding]
    problems: list[Problem] = field(default_factory=list)

    def steps(self, sample: Sequence[Tokens], *, trace: bool = False) -> Iterator[Step]:
        """All steps but the last; raises CheckError for one that cannot be run, InputError at the end where the files do not hold exactly
        the model's weights.

        With `trace` a block stays in memory until its step is dropped.
        """
        import torch

        tokens = torch.from_numpy(batch(sample))
        tensors = self.published.tensors(None)
        for number in self.published.blocks:
            if number >= self.architecture.layers:
                tensors.update(self.published.tensors(number))
        states = self._embedded(tokens, tensors)
        del tensors
        yield Step("embed", _arrays(states), {}, None)
        for number in range(self.architecture.layers):
            tensors = self.published.tensors(number)
            block = apart.block(self.architecture, number, tensors)
            self.problems.extend(block.problems)
            if self.problems:
                continue  # all of them at once, and no more work
            found = {run: _run(block, states[run], run) for run in (PLAIN, HALF)}
            if self.roundings.keys() & tensors.keys():
                del block
                block = apart.block(self.architecture, number, noise.rounded(tensors, self.roundings))
            del tensors
            same = states[ROUNDED] is states[PLAIN] and not self.roundings
            found[ROUNDED] = found[PLAIN] if same else _run(block, states[ROUNDED], ROUNDED)
            found.update({run: _run(block, states[run], run) for run in ORDERS})
            states = {run: state for run, (state, _) in found.items()}
            scores = {run: told.numpy() for run, (_, told) in found.items() if told is not None}

            def parts(state: Floats, run: str, block: apart.Block = block) -> Parts:
                told: dict[str, Any] = {}
                told["out"], _ = _run(block, torch.from_numpy(state), run, told)
                return _arrays(told)

            step = Step(f"block {number}", _arrays(states), scores, parts if trace else None)
            del block, parts, found
            yield step
            del step
        if self.problems:
            raise InputError("transformers' model and the checkpoint do not fit each other", self.problems)

    def _embedded(self, tokens: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """The states before the first block; sums in another order change nothing there, nor does bfloat16."""
        states = {}
        for run, weights in ((PLAIN, tensors), (ROUNDED, noise.rounded(tensors, self.roundings))):
            if run == PLAIN or self.roundings:
                ends = apart.ends(self.architecture, weights, head=False)
                self.problems.extend(ends.problems if run == PLAIN else ())
                with _running("the embedding"), computing(run, ends.model):
                    states[run] = ends.embed(tokens)
        states.setdefault(ROUNDED, states[PLAIN])
        return {**states, HALF: states[PLAIN], **dict.fromkeys(ORDERS, states[ROUNDED])}

    def head(self) -> "Head":
        """The last step."""
        tensors = self.published.tensors(None)
        plain = apart.ends(self.architecture, tensors, head=True)
        if not self.roundings.keys() & tensors.keys():
            return Head(plain, plain)
        return Head(plain, apart.ends(self.architecture, noise.rounded(tensors, self.roundings), head=True))


@dataclass(frozen=True)
class Head:
    """Final norm and output projection, as published and as the plan rounds them."""

    plain: apart.Ends
    rounded: apart.Ends

    def spoken(self, sample: Sequence[Tokens], states: Mapping[str, Floats]) -> Iterator[Spoken]:
        """The logits of each sequence, from the states behind the last block."""
        for number, tokens in enumerate(sample):
            found: dict[str, Floats] = {}
            for run, state in states.items():
                if run == ROUNDED and state is states[PLAIN] and self.rounded is self.plain:
                    found[run] = found[PLAIN]
                else:
                    found[run] = self._logits(state[number : number + 1, : len(tokens)], run)[0]
            yield Spoken(tokens, found)

    def parts(self, state: Floats, run: str) -> Parts:
        """What the final norm and the output projection make of a state (sequences, length, embed) in a run with rounded weights."""
        told: dict[str, Any] = {}
        logits = self._logits(state, run, told)
        return {**_arrays(told), "unembed": logits}

    def _logits(self, state: Floats, run: str, parts: dict[str, Any] | None = None) -> Floats:
        import torch

        ends = self.plain if run in (PLAIN, HALF) else self.rounded
        with _running("the output projection"), computing(run, ends.model):
            logits: Floats = ends.logits(torch.from_numpy(state), parts).float().numpy()
        return logits


def load_reference(path: str, roundings: Mapping[str, Rounding], files: Sequence[str] = (), prefix: str = "") -> Reference:
    """The source in a directory, to be computed in float32 with eager attention; `files` and `prefix` are the source's (`published`).

    Raises ConfigError without torch or transformers, InputError where there is no decoder of transformers'.
    """
    require_torch()
    return Reference(apart.architecture(path), Published(path, files, prefix), roundings)


def batch(sample: Sequence[Tokens]) -> Tokens:
    """Sequences as rows, padded behind to the longest."""
    rows = np.zeros((len(sample), max(len(tokens) for tokens in sample)), np.int64)
    for row, tokens in zip(rows, sample, strict=True):
        row[: len(tokens)] = tokens
    return rows


@contextmanager
def _running(step: str) -> Iterator[None]:
    """What a step of transformers' model raises, as a CheckError: the weights that are in it are not known to be at fault."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  it is transformers' code, on numbers of the user's config.json
        remedy = "see that config.json is of these weights, or compare the weights alone with --check weights"
        raise CheckError("the PyTorch model cannot be run", [Problem(f"{step} raised {said(error)}", remedy)]) from None


def _run(block: apart.Block, state: Any, run: str, parts: dict[str, Any] | None = None) -> tuple[Any, Any]:
    with _running(f"block {block.number}"), computing(run, block.model, block.number):
        return block.run(state, parts)


def _arrays(tensors: Mapping[str, Any]) -> dict[str, Floats]:
    """Tensors as float32 arrays, the same ones as the same."""
    made: dict[int, Floats] = {}
    return {name: made.setdefault(id(tensor), tensor.float().numpy()) for name, tensor in tensors.items()}
