"""A conversion from a config to a report: plan, drive, show. What `shardconv run` does, as one function.

A run that goes on plans with the memory budget of the run that began it: what the budget is now may differ, and the chunks of a plan must
not. Where the config says "auto" that is also the budget of this run; otherwise the chunks have to fit the present one (`preflight`).
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from rich.console import Console

from shardconv.checking import check_run, refuse_to_replace, require
from shardconv.config import Config, RunOptions
from shardconv.errors import ConfigError, ShardconvError
from shardconv.ledger import Header, Ledger
from shardconv.page import PAGE, write_page
from shardconv.plan import Plan
from shardconv.planning import budgeted, plan_from_config, with_budget, worker_budget
from shardconv.progress import JsonLines, View, watching
from shardconv.report import Json, figures, print_summary, versions
from shardconv.run import Note
from shardconv.run.driver import Check, Outcome, Stages, drive
from shardconv.run.gang import MeshRequest
from shardconv.run.job import Place, state_path
from shardconv.run.preflight import Request
from shardconv.sinks.paths import final_path
from shardconv.sinks.spec import StoreOptions
from shardconv.verify.verdict import raise_if_unequal


def run(config: Config, options: RunOptions) -> Json:
    """Convert as the config says, show progress on stderr and a summary on stdout; the content of report.json.

    Raises ShardconvError, of which RunError leaves a state that the same call goes on from, and CheckError what was written.
    """
    found: Json = {}

    def save(outcome: Outcome) -> Json:
        found.update(figures(outcome))
        return found

    watched = watching(quiet=options.verbosity < 0, verbose=options.verbosity > 0, json_logs=options.json_logs)
    with watched as view, _errors_as_events(view):
        stages = Stages(view.hear)
        stages.enter("plan")
        previous = None if options.restart else Ledger(state_path(config.output.path)).header()
        with _with_budget(config, previous, verbose=options.verbosity > 0) as present:
            begun = present if previous is None else with_budget(present, previous.budget)
            plan = plan_from_config(begun, compare_ends=True)
            require(present, plan)
            drive(request_of(present, options), plan, stages, view.hear, save, _check_of(present, plan, stages))
        _leave_page(found, state_path(config.output.path), view)
    with _errors_as_events(view):
        _show(found, options, view)
        if isinstance(verdict := found["check"], dict):
            raise_if_unequal(verdict)
    return found


@contextmanager
def _errors_as_events(view: View) -> Iterator[None]:
    """An error of the user's is an event as well, for programs that read the log."""
    try:
        yield
    except ShardconvError as error:
        if isinstance(view, JsonLines):
            view.write("error", {"code": int(error.exit_code), "message": str(error)})
        raise


def _check_of(config: Config, plan: Plan, stages: Stages) -> Check | None:
    """What the driver is to do with a checkpoint before it puts it in the place of another, or calls it finished."""
    if config.check.mode == "none":
        return None

    def check(place: Place) -> Json:
        folder = final_path(place.out, place.step, place.item)
        found = check_run(config, plan, folder, Ledger(place.state).workers, stages.enter)
        if place.aside and place.committed != place.checkpoint and os.path.lexists(place.checkpoint):
            refuse_to_replace(found, folder, place.checkpoint)
        return found

    return check


def _leave_page(found: Json, state: str, view: View) -> None:
    """report.html beside report.json; that it cannot be written is worth a note and undoes nothing."""
    try:
        write_page(found, os.path.join(state, PAGE))
    except ConfigError as error:
        view.hear(Note(str(error)))


def _show(found: Json, options: RunOptions, view: View) -> None:
    if isinstance(view, JsonLines):
        view.write("report", found)
    elif options.verbosity >= 0:
        print_summary(found, Console(file=sys.stdout, markup=False, highlight=False, soft_wrap=True))


def _with_budget(config: Config, previous: Header | None, *, verbose: bool) -> AbstractContextManager[Config]:
    """The config with the memory budget as a number."""
    if config.workers.memory_budget == "auto" and previous is not None:
        return nullcontext(with_budget(config, previous.budget))
    return budgeted(config, config.workers.address, verbose=verbose)


def request_of(config: Config, options: RunOptions) -> Request:
    """What the driver is asked for."""
    output, workers = config.output, config.workers
    return Request(
        output=os.path.abspath(output.path),
        step=output.step,
        item=output.item,
        store=StoreOptions(zarr=output.zarr, ocdbt=output.ocdbt, compression=output.compression),
        settings=config.facts(),
        provenance={"versions": versions(), "config": config.facts(), "config_digest": config.digest(), "made": _now()},
        executor=workers.executor,
        address=None if workers.address == "local" else workers.address,
        count=workers.count,
        budget=worker_budget(config),
        restart=options.restart,
        overwrite=options.overwrite,
        verbose=options.verbosity > 0,
        mesh=MeshRequest(config.mesh.placement, config.mesh.platform, workers.max_restarts),
    )


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
