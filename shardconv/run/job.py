"""The job: what the workers and the commit need to know beside the plan. It is JSON in the ledger, so only its path travels.

A checkpoint that replaces another is made `aside`, in the state directory, and changes places with the old one when it is complete; any
other is made where it will be, under Orbax's name for unfinished checkpoints.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import TypeAdapter

from shardconv.ledger import Ledger
from shardconv.plan import Plan, plan_from_json
from shardconv.sinks.paths import checkpoint_path, stage_path
from shardconv.sinks.spec import StoreOptions

ASIDE = "complete"  # below the state directory, where a checkpoint is made that will replace another


@dataclass(frozen=True)
class Place:
    """Where a checkpoint goes: the output's path, the step and item in it, and whether it is made aside first."""

    output: str
    step: int | None
    item: str | None
    aside: bool

    @property
    def state(self) -> str:
        """The state directory of this output."""
        return state_path(self.output)

    @property
    def out(self) -> str:
        """The directory that is committed as if it were the output."""
        return os.path.join(self.state, ASIDE) if self.aside else self.output

    @property
    def stage(self) -> str:
        """The directory that workers write into."""
        return stage_path(self.out, self.step, self.item)

    @property
    def committed(self) -> str:
        """The directory that appears at the commit."""
        return checkpoint_path(self.out, self.step)

    @property
    def checkpoint(self) -> str:
        """The directory that is there in the end."""
        return checkpoint_path(self.output, self.step)


def state_path(output: str) -> str:
    """The state directory of an output.

    >>> state_path("/data/llama")
    '/data/llama.shardconv'
    """
    return os.path.abspath(output) + ".shardconv"


@dataclass(frozen=True)
class Job:
    """Where the checkpoint goes, how arrays are stored, and what is kept with it beside what the plan says."""

    place: Place
    store: StoreOptions
    provenance: Mapping[str, object]

    def to_data(self) -> dict[str, object]:
        """The job as JSON data."""
        data: dict[str, object] = _JOB.dump_python(self, mode="json")
        return data


_JOB: TypeAdapter[Job] = TypeAdapter(Job)


def load_job(ledger: Ledger) -> Job:
    """The job that a run has begun."""
    return _JOB.validate_python(ledger.job())


def load_plan(ledger: Ledger) -> Plan:
    """The plan that a run has begun."""
    with open(ledger.plan_path, "rb") as file:
        return plan_from_json(file.read())
