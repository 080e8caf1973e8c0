"""The check, asked for by a config: what `shardconv verify` does, and the last stage of `shardconv run`.

Both build the same request: the plan, the target as the config words it, and who works. `verify` answers it in this process; a run asks a
child for it, since the driver loads no TensorStore.
"""

import os
from collections.abc import Mapping
from typing import Any

from shardconv.budget import this_machine
from shardconv.config import Config
from shardconv.errors import CheckError, ConfigError, Problem
from shardconv.plan import Plan
from shardconv.planning import plan_from_config, worker_budget
from shardconv.sinks.paths import final_path
from shardconv.verify.pool import answer_of_child
from shardconv.verify.request import Request
from shardconv.verify.second import Choices
from shardconv.verify.verdict import raise_if_unequal

Json = dict[str, Any]


def verify(config: Config) -> Json:
    """Compare a checkpoint that is there with its source; the verdict as data.

    Raises ConfigError where there is no checkpoint, InputError where the source cannot be read, CheckError where the checkpoint cannot.
    """
    output = config.output
    folder = final_path(output.path, output.step, output.item)
    if not os.path.exists(folder):
        remedy = "run `shardconv run CONFIG` first, or correct output.path, output.step and output.item"
        raise ConfigError("there is nothing to verify", [Problem(f"there is no checkpoint at {folder}", remedy)])
    plan = plan_from_config(config, compare_ends=True)
    return checked(request_of(config, plan, folder))


def checked(request: Request) -> Json:
    """The verdict as data, found in this process."""
    from shardconv.verify.weights import check  # and with it TensorStore

    return check(request).to_json()


def check_run(config: Config, plan: Plan, folder: str) -> Json:
    """The verdict on what a run has written, by a child process; raises what `verify` raises, and RunError where the child dies."""
    found: Json = answer_of_child("shardconv.checking:checked", request_of(config, plan, folder))
    return found


def refuse_to_replace(found: Mapping[str, Any], folder: str, kept: str) -> None:
    """Raise CheckError where what should take a checkpoint's place differs from its source."""
    try:
        raise_if_unequal(found)
    except CheckError as error:
        fact = f"{kept} is left as it was; what was written is in {folder}"
        raise CheckError(error.title, [*error.problems, Problem(fact, "--restart --overwrite converts again")]) from None


def request_of(config: Config, plan: Plan, folder: str) -> Request:
    """What the check is asked for."""
    target, sample = config.target, config.check.sample
    return Request(
        folder=os.path.abspath(folder),
        plan=plan,
        choices=Choices(
            target.layout, target.scan_layers, target.dtype, target.query_dtype or "", target.rope, target.vocab_size or 0
        ),
        workers=config.workers.count or this_machine().cores,
        memory=worker_budget(config),
        sample=None if sample == "auto" else 0 if sample == "all" else sample,
        seed=config.check.seed,
    )
