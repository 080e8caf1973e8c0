"""A conversion of a tiny model with a fault in it, by the real parts, and what `all` checks say of it.

The model is transformers' own, with random weights that hide nothing; it is written by transformers, converted unit by unit, committed by
Orbax, and checked as `shardconv verify --check all` checks it.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from logit_cases import FAMILIES
from test_models import torch_model
from written import change, plan_of, write

from shardconv.errors import CheckError, InputError
from shardconv.family import Family, Layout
from shardconv.plan import Plan
from shardconv.sharding import MeshRules
from shardconv.source import Source
from shardconv.verify import logits, weights
from shardconv.verify.logit_request import Bounds, LogitRequest
from shardconv.verify.request import Request
from shardconv.verify.roundings import roundings
from shardconv.verify.second import Choices

Array = np.ndarray[Any, Any]

# Most leaves of a tiny model are in several chunks, and most conversions have several units.
CHUNK = 4096
MESH = MeshRules({"fsdp": 4, "tensor": 2}, {"embed": ("fsdp",), "heads": ("tensor",), "mlp": ("tensor",), "vocab": ("tensor",)})
LENGTHS = (64, 80)
SEED = 3


@dataclass(frozen=True)
class Conversion:
    """What is converted and how; the defaults are a sound one."""

    family: str = "llama"
    layout: str = "flat"
    stored: str = "float32"
    dtype: str = "source"
    scanned: bool = True
    rope: str = "auto"
    vocab: int = 0
    mesh: MeshRules = MESH
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def config(self) -> dict[str, Any]:
        """The model's config.json."""
        return {**FAMILIES[self.family], **self.settings}

    @property
    def choices(self) -> Choices:
        """What the check of the weights knows of it."""
        return Choices(self.layout, self.scanned, self.dtype, "", self.rope, self.vocab)


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong, at one of the places where it can be.

    `table` and `tables_of_family` change the layout's and the family's table, `source` what the opened source says, `broken` is entered
    while units are carried out, `written` changes what the converter believes it was asked for, `edit` changes a stored array afterwards,
    and `reader` is entered while the checkpoint is read and run.
    """

    where: str
    conversion: Conversion = Conversion()
    table: Callable[[Layout], Layout] = lambda table: table
    tables_of_family: Callable[[Family], Family] = lambda family: family
    source: Callable[[Source], Source] = lambda source: source
    broken: Callable[[], AbstractContextManager[object]] = nullcontext
    written: Mapping[str, Any] = field(default_factory=dict)
    edit: tuple[str, Callable[[Array], None]] | None = None
    reader: Callable[[], AbstractContextManager[object]] = nullcontext


@dataclass(frozen=True)
class Found:
    """What each check said: nothing where it found nothing wrong."""

    weights: tuple[str, ...]
    logits: tuple[str, ...]
    ratio: float | None


@cache
def model_of(root: Path, family: str, settings: tuple[tuple[str, Any], ...], stored: str, seed: int) -> Path:
    """A checkpoint of random weights, written by transformers once."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = root / f"source{len(list(root.iterdir()))}"
    config = {**FAMILIES[family], **dict(settings)}
    torch_model(config, seed).to(getattr(torch, stored)).save_pretrained(folder, max_shard_size="60KB")
    return folder


def source_of(root: Path, conversion: Conversion) -> Path:
    """The checkpoint that is converted."""
    settings = tuple((key, value) for key, value in conversion.settings.items())
    return model_of(root, conversion.family, settings, conversion.stored, conversion.seed)


def convert_and_check(root: Path, fault: Fault) -> Found:
    """Convert with the fault, and ask both checks."""
    folder = source_of(root, fault.conversion)
    wanted = replace(fault.conversion, **fault.written)
    plan = plan_of(
        folder,
        wanted.choices,
        layout=fault.table,
        family=fault.tables_of_family,
        reading=fault.source,
        chunk=CHUNK,
        mesh=wanted.mesh,
    )
    out = root / "out"
    try:
        with fault.broken():
            write(plan, out)
        if fault.edit is not None:
            change(out, *fault.edit)
        return Found(_weights(plan, fault.conversion, out), *_logits(folder, plan, fault, out))
    finally:
        shutil.rmtree(out)


def _weights(plan: Plan, conversion: Conversion, out: Path) -> tuple[str, ...]:
    verdict = weights.check(Request(str(out), plan, conversion.choices, 1, 64 << 20, None, SEED))
    return tuple(problem.remedy or problem.fact.splitlines()[0] for problem in verdict.problems)


def _logits(folder: Path, plan: Plan, fault: Fault, out: Path) -> tuple[tuple[str, ...], float | None]:
    rope = fault.conversion.rope
    request = LogitRequest(str(out), str(folder), rope, roundings(plan), "auto", LENGTHS, SEED, None, Bounds(), False, 1 << 30)
    try:
        with fault.reader():
            found = logits.check(request).to_json()
    except (CheckError, InputError) as error:
        return tuple(problem.fact for problem in error.problems), None
    judged, allowed = found["differences"]["judged"]["max_abs"], found["bounds"]["max_abs"]
    ratio = judged / allowed if isinstance(judged, float) else None
    return tuple(problem["fact"].splitlines()[0] for problem in found["problems"]), ratio


@contextmanager
def replaced(owner: object, name: str, other: Callable[[Any], Any]) -> Iterator[None]:
    """While this is entered, `owner.name` is what `other` makes of it."""
    before = getattr(owner, name)
    setattr(owner, name, other(before))
    try:
        yield
    finally:
        setattr(owner, name, before)
