"""The checks, asked for by a config: what `shardconv verify` does, and the last stage of `shardconv run`.

    weights   what is stored against the source, bit by bit (`verify.weights`)
    logits    what both models compute (`verify.logits`), always in a child process: it loads JAX and torch, and ends with them

Both commands build the same requests. `verify` compares the weights in this process and on its workers; a run asks a child or a Ray task
for that, since the driver loads no TensorStore. What a comparison needs and is not there is said by `require`, before any byte is written.
"""

import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from shardconv.budget import this_machine
from shardconv.config import Config
from shardconv.errors import CheckError, ConfigError, Problem
from shardconv.models.hf import decoder_of
from shardconv.plan import Plan
from shardconv.planning import budgeted, plan_from_config, worker_budget
from shardconv.porting.making import is_own
from shardconv.run import Began, Stage
from shardconv.sinks.paths import final_path
from shardconv.verify.forwards import require_forward
from shardconv.verify.logit_request import Bounds, LogitRequest
from shardconv.verify.pool import ENVIRONMENT, answer_of_child, answer_of_task
from shardconv.verify.reference import require_torch
from shardconv.verify.request import Request
from shardconv.verify.roundings import roundings
from shardconv.verify.sample import prompt_lines
from shardconv.verify.second import Choices
from shardconv.verify.verdict import raise_if_unequal

Json = dict[str, Any]

# A mesh with a sharded axis or two needs no more, and two cores do not carry more virtual devices well.
VIRTUAL_DEVICES = 8
DEVICE_FLAG = "--xla_force_host_platform_device_count"


def verify(config: Config) -> Json:
    """Compare a checkpoint that is there with its source; the verdict as data.

    Raises ConfigError where there is no checkpoint or the comparison cannot be made, InputError where the source cannot be read,
    CheckError where the checkpoint cannot.
    """
    output = config.output
    folder = final_path(output.path, output.step, output.item)
    if not os.path.exists(folder):
        remedy = "run `shardconv run CONFIG` first, or correct output.path, output.step and output.item"
        raise ConfigError("there is nothing to verify", [Problem(f"there is no checkpoint at {folder}", remedy)])
    address = os.environ.get("RAY_ADDRESS") or config.workers.address  # as it is for a run
    with budgeted(config, "local" if config.check.mode == "logits" else address, verbose=False) as settled:
        plan = plan_from_config(settled, compare_ends=True)
        require(settled, plan)
        with _shown_on_a_terminal() as (progress, enter):
            return _verdict(settled, plan, folder, address, progress, weights=checked, enter=enter)


@contextmanager
def _shown_on_a_terminal() -> Iterator[tuple[str, Callable[[str], None]]]:
    """A live view of the check: the directory in which it looks, and what hears of stages; "" and nobody where there is no terminal."""
    if not sys.stderr.isatty():
        yield "", lambda _: None
        return
    from shardconv.progress import watching

    with tempfile.TemporaryDirectory() as folder, watching(quiet=False, verbose=False, json_logs=False) as view:
        view.hear(Began((), frozenset(), folder, 0))
        view.hear(Stage("check"))
        yield folder, lambda name: view.hear(Stage(name))


def check_run(config: Config, plan: Plan, folder: str, progress: str, enter: Callable[[str], None]) -> Json:
    """The verdict on what a run has written; how far it is goes into the directory `progress`, a stage that begins to `enter`.

    Raises what `verify` raises, and RunError where a process dies. Ray, where the run has it, is used on.
    """
    return _verdict(config, plan, folder, config.workers.address, progress, weights=_answered_elsewhere, enter=enter)


def _answered_elsewhere(request: Request) -> Json:
    function = "shardconv.checking:checked"
    if request.executor == "ray":
        found: Json = answer_of_task(function, request, request.address, request.workers)
        return found
    answer: Json = answer_of_child(function, request, ENVIRONMENT)
    return answer


def _verdict(
    config: Config,
    plan: Plan,
    folder: str,
    address: str | None,
    progress: str,
    *,
    weights: Callable[[Request], Json],
    enter: Callable[[str], None],
) -> Json:
    """Both verdicts under one: "weights" and "logits" are null where the config does not ask for them."""
    mode = config.check.mode if config.check.mode != "none" else "weights"
    parts: dict[str, Json | None] = {"weights": None, "logits": None}
    if mode in ("weights", "all"):
        parts["weights"] = weights(request_of(config, plan, folder, address, progress))
    if mode in ("logits", "all"):
        enter("logits")
        parts["logits"] = _logits(config, plan, folder)
    problems = [problem for part in parts.values() if part is not None for problem in part["problems"]]
    return {"mode": mode, "equal": not problems, "problems": problems, **parts}


def checked(request: Request) -> Json:
    """The verdict on the weights as data, found in this process."""
    from shardconv.verify.weights import check  # and with it TensorStore

    return check(request).to_json()


def compared(request: LogitRequest) -> Json:
    """The verdict on the logits as data, found in this process; a checkpoint that no forward can read is a verdict too."""
    from shardconv.verify.logits import check  # and with it JAX

    try:
        return check(request).to_json()
    except CheckError as error:
        problems = [{"fact": one.fact, "remedy": one.remedy} for one in error.problems]
        return {"equal": False, "problems": problems, "notes": [], "title": error.title}


def _logits(config: Config, plan: Plan, folder: str) -> Json:
    found: Json = answer_of_child("shardconv.checking:compared", logit_request_of(config, plan, folder), _environment(config))
    return found


def _environment(config: Config) -> dict[str, str]:
    """Of the process that computes logits: as many devices as the mesh has, if they are virtual; and it leaves memory to others."""
    devices = min(math.prod(config.mesh.axes.values()), VIRTUAL_DEVICES)
    flags = os.environ.get("XLA_FLAGS", "")
    return {
        "XLA_FLAGS": flags if DEVICE_FLAG in flags else f"{flags} {DEVICE_FLAG}={devices}".strip(),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TOKENIZERS_PARALLELISM": "false",
        "MALLOC_ARENA_MAX": ENVIRONMENT["MALLOC_ARENA_MAX"],
    }


def require(config: Config, plan: Plan) -> None:
    """Raises ConfigError with all that the comparison which a config asks for lacks; reads and writes nothing."""
    if config.check.mode not in ("logits", "all"):
        return
    problems: list[Problem] = []
    for ask in (require_torch, lambda: _require_forward(config, plan), lambda: _require_prompts(config, plan)):
        try:
            ask()
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError("the logits cannot be compared", problems)


def foreseen(config: Config, plan: Plan) -> Plan:
    """The plan with a note for all that `require` would refuse, for who asks before anything is installed or written."""
    try:
        require(config, plan)
    except ConfigError as error:
        said = (f"a run is refused, as check.mode is {config.check.mode!r}: {one.fact}; {one.remedy}" for one in error.problems)
        return replace(plan, notes=(*plan.notes, *said))
    return plan


def _forward(config: Config, plan: Plan) -> str:
    """Whose forward: for a model that ours does not know, and a layout that PyTorch's own module can take, that module's."""
    if config.check.forward != "auto":
        return config.check.forward
    try:
        decoder_of(plan.source.config or {})
    except ConfigError:
        return "torch" if plan.layout == "flat" else "auto"
    return "auto"


def _require_forward(config: Config, plan: Plan) -> None:
    forward = _forward(config, plan)
    if is_own(plan.layout) and forward in ("auto", "torch"):
        remedy = 'set check.forward = "module:function"; models that are no language models: shardconv.porting.agreement'
        raise ConfigError("no forward is known", [Problem(f"{plan.layout} is a model of your own, which no forward of ours runs", remedy)])
    if forward == "auto":
        decoder_of(plan.source.config or {})
        return
    require_forward(forward, plan.layout)


def _require_prompts(config: Config, plan: Plan) -> None:
    path = config.check.prompts
    if path is None:
        return
    problems = []
    try:
        fact = None if prompt_lines(path) else "has no lines"
    except (OSError, UnicodeDecodeError) as error:
        fact = "is not a file" if isinstance(error, OSError) else "is no text in UTF-8"
    if fact is not None:
        problems.append(Problem(f"check.prompts: {path} {fact}", "give a text file with a prompt in each line"))
    if not any(name.startswith(("tokenizer", "vocab.")) for name in os.listdir(plan.source.root)):
        remedy = 'put the tokenizer\'s files beside the weights, or set check.prompts = "none"'
        problems.append(Problem(f"check.prompts: {plan.source.root} has no tokenizer", remedy))
    if problems:
        raise ConfigError("the prompts cannot be read", problems)


def refuse_to_replace(found: Mapping[str, Any], folder: str, kept: str) -> None:
    """Raise CheckError where what should take a checkpoint's place differs from its source."""
    try:
        raise_if_unequal(found)
    except CheckError as error:
        fact = f"{kept} is left as it was; what was written is in {folder}"
        raise CheckError(error.title, [*error.problems, Problem(fact, "--restart --overwrite converts again")]) from None


def request_of(config: Config, plan: Plan, folder: str, address: str | None, progress: str) -> Request:
    """What the check of the weights is asked for."""
    target, workers, sample = config.target, config.workers, config.check.sample
    joined = None if workers.executor == "local" or address == "local" else address
    return Request(
        folder=os.path.abspath(folder),
        plan=plan,
        choices=Choices(
            target.layout, target.scan_layers, target.dtype, target.query_dtype or "", target.rope, target.vocab_size or 0
        ),
        workers=workers.count or (this_machine().cores if joined is None else 0),
        memory=worker_budget(config),
        sample=None if sample == "auto" else 0 if sample == "all" else sample,
        seed=config.check.seed,
        executor=workers.executor,
        address=joined,
        progress=progress,
    )


def logit_request_of(config: Config, plan: Plan, folder: str) -> LogitRequest:
    """What the comparison of the logits is asked for."""
    check = config.check
    return LogitRequest(
        checkpoint=os.path.abspath(folder),
        source=os.path.abspath(plan.source.root),
        rope=config.target.rope,
        roundings=roundings(plan),
        forward=_forward(config, plan),
        lengths=check.lengths,
        seed=check.seed,
        prompts=None if check.prompts is None else os.path.abspath(check.prompts),
        bounds=Bounds(check.max_abs, check.mean_abs, check.max_kl, check.factor),
        trace=check.trace,
        memory=this_machine().available // 2 if check.memory == "auto" else check.memory,
        files=tuple(plan.source.files),
        prefix=plan.source.prefix,
    )
