"""Do both sides think the same? The logits of the written checkpoint, in JAX, against those of the PyTorch model, of the source files.

    source files ---------- transformers' blocks ----- states, logits \\
                                                                        agreement, divergence -> verdict
    written checkpoint ---- shardconv.models --------- states, logits /

The checkpoint is restored by Orbax onto a mesh, or read block by block where its arrays would not fit, and `shardconv.models` reads it as
its layout's code would; or a forward of the user's own takes the restored arrays. The reference is transformers' model, block by block.
Logits of one sequence are held at a time; `agreement` judges.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from shardconv.errors import CheckError, InputError, Problem
from shardconv.models.decoder import unembedded, weights_of
from shardconv.models.description import Reading
from shardconv.models.hf import decoder_of
from shardconv.models.reading import read
from shardconv.models.shapes import misshapen
from shardconv.verify.agreement import LogitReport, Measured, compare, measure
from shardconv.verify.differences import Logits, Tokens
from shardconv.verify.divergence import Divergence, StepGap
from shardconv.verify.fetching import weights_on_demand
from shardconv.verify.logit_request import Bounds, LogitRequest
from shardconv.verify.logit_verdict import LogitVerdict
from shardconv.verify.reference import Head, Reference, load_reference
from shardconv.verify.restoring import Described, describe, restore
from shardconv.verify.sample import prompt_sample, random_sample, within
from shardconv.verify.unseen import Unseen, unseen_of
from shardconv.verify.walking import Side, Walked, end_gap, walk

# Logits (batch, length, rows) of token ids (batch, length), int32.
Forward = Callable[[npt.NDArray[np.int32]], npt.ArrayLike]


def check(request: LogitRequest) -> LogitVerdict:
    """Compares the logits of a checkpoint with those of its source.

    Raises ConfigError where torch or a forward for the model is missing, InputError where the source's files do not hold the model,
    CheckError where the layout's code could not read the checkpoint, or the PyTorch model cannot be run.
    """
    start, cpu = time.perf_counter(), time.process_time()
    config = hf_config(request.source)
    reference = load_reference(request.source, request.roundings, request.files, request.prefix)
    sample = random_sample(reference.architecture.vocab, request.seed, request.lengths)
    if request.prompts is not None:
        sample += prompt_sample(request.prompts, request.source)
    sample, cut = within(sample, config)
    devices = jax.devices()
    described = describe(request.checkpoint, devices)
    unseen: tuple[Unseen, ...] | None
    unsought = ""
    layer_by_layer = request.forward == "auto" and described.nbytes > request.memory
    if request.forward == "auto":
        side = jax_side(described, config, request.rope, devices, layer_by_layer=layer_by_layer)
        found = side_by_side(reference, side, sample, request.bounds, seed=request.seed, trace=request.trace)
        unseen = unseen_by(side.weights.reading, described, sample, found.walked)
    else:
        from shardconv.verify.forwards import TRACED, forward_of
        from shardconv.verify.insensitive import insensitive_leaves

        restored = restore(request.checkpoint, devices)
        found = by_logits(reference, forward_of(request.forward, request.source, restored), sample, request.bounds, seed=request.seed)
        if request.forward == TRACED:
            unseen = unseen_by(reading_of(described, config, request.rope), described, sample, found.walked)
        else:
            judged = judged_tokens(sample, found.walked)
            unseen, unsought = insensitive_leaves(request.forward, restored.leaves, judged, request.memory, time.perf_counter() - start)
    return LogitVerdict(
        report=found.report,
        forward=request.forward,
        seed=request.seed,
        prompts=request.prompts,
        cut=cut,
        blocks=found.gaps,
        divergence=found.divergence if request.trace or not found.report.same else None,
        traced=request.trace,
        unrouted=found.walked.unrouted,
        unseen=unseen,
        unsought=unsought,
        platform=devices[0].platform,
        devices=len(devices),
        mesh=dict(described.mesh.shape),
        layer_by_layer=layer_by_layer,
        pid=os.getpid(),
        seconds=time.perf_counter() - start,
        cpu_seconds=time.process_time() - cpu,
        peak_rss_bytes=peak_rss(),
    )


@dataclass(frozen=True)
class Found:
    """The comparison of logits, and what is known of the steps before them."""

    report: LogitReport
    walked: Walked
    gaps: tuple[StepGap, ...]
    divergence: Divergence | None


def unseen_by(reading: Reading, described: Described, sample: Sequence[Tokens], walked: Walked) -> tuple[Unseen, ...]:
    """What the judged logits do not depend on, as the checkpoint is read."""
    shapes = {name: leaf.shape for name, leaf in described.leaves.items()}
    judged = judged_tokens(sample, walked)
    return unseen_of(reading, shapes, judged, walked.experts, walked.unrouted)


def judged_tokens(sample: Sequence[Tokens], walked: Walked) -> list[Tokens]:
    """Of each sequence the tokens whose logits are judged; a causal model's do not depend on those behind."""
    return [tokens[:count] for tokens, count in zip(sample, walked.judged.tolist(), strict=True)]


def jax_side(described: Described, config: dict[str, object], rope: str, devices: Sequence[jax.Device], *, layer_by_layer: bool) -> Side:
    """The checkpoint as its layout's code reads it: whole, or block by block."""
    published = decoder_of(config)
    reading = reading_of(described, config, rope)
    if layer_by_layer:
        return Side(weights_on_demand(reading, described), published)
    return Side(weights_of(reading, restore(described.path, devices).leaves), published)


def reading_of(described: Described, config: dict[str, object], rope: str) -> Reading:
    """How its layout's code reads a checkpoint."""
    layout, scanned = described.metadata["shardconv"]["layout"], bool(described.metadata["scan_layers"])
    reading = read(layout, decoder_of(config), described.leaves.keys(), scanned=scanned, rope=rope)
    if problems := list(misshapen(reading, {name: leaf.shape for name, leaf in described.leaves.items()})):
        raise CheckError("the arrays have other shapes than the model", problems)
    return reading


def side_by_side(
    reference: Reference, side: Side, sample: Sequence[Tokens], bounds: Bounds, *, seed: int = 0, trace: bool = False
) -> Found:
    """Compares the states behind every block, and then the logits."""
    walked = walk(reference, sample, side, factor=bounds.factor, trace=trace)
    state, head = walked.state, reference.head()
    assert state is not None
    project = unembedded(side.weights)
    found = (
        np.asarray(project(jnp.asarray(state[number : number + 1, : len(tokens)])))[0] for number, tokens in enumerate(sample)
    )
    report = compare(zip(_measured(head, sample, walked), found, strict=True), bounds, seed)
    last = _of_logits(report)
    divergence = walked.divergence or end_gap(last, head, side, walked, bounds.factor, trace=trace)
    return Found(report, walked, (*walked.gaps, last), divergence)


def by_logits(reference: Reference, forward: Forward, sample: Sequence[Tokens], bounds: Bounds, *, seed: int = 0) -> Found:
    """Compares the logits of another forward, sequence by sequence, all padded behind to the longest so that it compiles once."""
    walked = walk(reference, sample, None, factor=bounds.factor, trace=False)
    longest = max(len(tokens) for tokens in sample)

    def found() -> Iterator[Logits]:
        for tokens in sample:
            padded = np.pad(tokens, (0, longest - len(tokens)))[None].astype(np.int32)
            yield np.asarray(forward(padded), np.float32)[0, : len(tokens)]

    report = compare(zip(_measured(reference.head(), sample, walked), found(), strict=True), bounds, seed)
    return Found(report, walked, (), None)


def _measured(head: Head, sample: Sequence[Tokens], walked: Walked) -> Iterator[Measured]:
    for spoken, decided in zip(head.spoken(sample, walked.states), walked.decided, strict=True):
        yield measure(spoken, decided)


def _of_logits(report: LogitReport) -> StepGap:
    """The last step's gap, which departs as the verdict says."""
    return StepGap("logits", report.judged.max_abs, report.reordered.max_abs, report.largest, departs=not report.same)


def hf_config(source: str) -> dict[str, object]:
    """The config.json of a checkpoint's directory; raises InputError."""
    try:
        with open(os.path.join(source, "config.json"), encoding="utf-8") as file:
            config: dict[str, object] = json.load(file)
    except (OSError, ValueError) as error:
        raise InputError("the model's numbers are not known", [Problem(str(error), "put config.json beside the weights")]) from None
    return config


def peak_rss() -> int:
    """The most bytes of RAM that this process has had, as the kernel counts them."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except OSError:  # no /proc; what getrusage says may be a parent's
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
