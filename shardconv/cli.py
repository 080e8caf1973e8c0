"""The command line: what may be typed, and which function it calls.

A command loads the config, calls one function and shows what it returns; it computes nothing. What a command needs is imported when it
runs, so that `shardconv --help` and `shardconv plan` start without JAX, Ray and TensorStore (a test holds them to it). Flags of `run` that
have a key in the config are overrides of that key, so there is one truth. Exit codes are `shardconv.errors.ExitCode`; see `shardconv.door`.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Literal, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from shardconv import __version__
from shardconv.budget import parse_size
from shardconv.config import Config, RunOptions, load_config
from shardconv.door import Door, enter
from shardconv.errors import ConfigError, Problem
from shardconv.json_text import json_text

HELP = """Convert PyTorch and safetensors checkpoints into sharded Orbax checkpoints, in bounded memory.

Exit codes: 0 done; 2 usage or config; 3 the source is not as it should be; 4 a check failed; 5 stopped, and can be resumed."""

# Of tables in files and pipes: a parameter's name, its source and its shapes fit on a line.
WIDTH = 300

app = typer.Typer(cls=Door, help=HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="A TOML file; `shardconv init` writes one.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key: --set target.dtype=bfloat16")]
Sample = Annotated[
    str | None, typer.Option(metavar="N", help='Look at N boxes of each array; "all": at every element, "auto": by size.')
]
Check = Annotated[
    str | None, typer.Option(metavar="CHECK", help='What is compared: "weights", the default, "logits", "all" of both, or "none".')
]
Placement = Annotated[
    str | None,
    typer.Option(metavar="WAY", help='"stream", the default, or onto the mesh and written from there: "mesh", "mesh-host", "mesh-device".'),
]
Trace = Annotated[bool, typer.Option("--trace", help="If logits differ, find the first part of the first block that does.")]
Json = Annotated[bool, typer.Option("--json", help="The same as JSON, on stdout.")]


NUMBERS = ("check.sample", "workers.max_restarts")
_TRACED: Mapping[bool, tuple[str, ...]] = {True: ("check.trace=true",), False: ()}


def main() -> None:
    """The program `shardconv`."""
    enter(app)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"shardconv {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    del version  # its callback has done everything


def _said(flags: Mapping[str, str | None]) -> list[str]:
    """Flags as overrides of the config: TOML strings, so that no address or size is taken for a number; some may be one."""
    numbers = {key for key, value in flags.items() if key in NUMBERS and value is not None and value.lstrip("-").isdigit()}
    return [f"{key}={value if key in numbers else json.dumps(value)}" for key, value in flags.items() if value is not None]


@contextmanager
def _errors_in_log(json_logs: bool) -> Iterator[None]:
    """With --json-logs an error of the config is an event as well, as all later ones are."""
    try:
        yield
    except ConfigError as error:
        if json_logs:
            event = {"time": round(time.time(), 3), "event": "error", "code": int(error.exit_code), "message": str(error)}
            typer.echo(json.dumps(event), err=True)
        raise


def _require_use(config: Config, sample: str | None, trace: bool) -> None:
    """Raises ConfigError for a flag of a check that is not made."""
    mode, problems = config.check.mode, []
    if sample is not None and mode in ("logits", "none"):
        remedy = "it is for the weights: add --check all, or leave it out"
        problems.append(Problem(f'--sample {sample}, and check.mode is "{mode}"', remedy))
    if trace and mode in ("weights", "none"):
        problems.append(Problem(f'--trace, and check.mode is "{mode}"', "it is for the logits: add --check logits, or leave it out"))
    if problems:
        raise ConfigError("a flag has nothing to do", problems)


class _Output(Console):
    """Stdout; who reads only the first lines of it (`| head`) has what he wants."""

    def on_broken_pipe(self) -> None:
        _leave_closed_pipe()


def _leave_closed_pipe() -> NoReturn:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes when it ends
    raise typer.Exit


def _console() -> Console:
    """Stdout for tables: without markup, because names and shapes have square brackets, and wide where no terminal sets the width."""
    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDTH
    return _Output(markup=False, highlight=False, width=wide)


def _echo_json(value: object) -> None:
    try:
        typer.echo(json_text(value))
    except BrokenPipeError:
        _leave_closed_pipe()


@app.command()
def plan(config: ConfigPath, overrides: Set = None, placement: Placement = None, as_json: Json = False) -> None:
    """Show what a run would read, write and need; reads headers only and writes nothing."""
    loaded = load_config(config, [*(overrides or ()), *_said({"mesh.placement": placement})])
    from shardconv.planning import plan_from_config

    found = plan_from_config(loaded)
    if loaded.check.mode in ("logits", "all"):
        from shardconv.checking import foreseen

        found = foreseen(loaded, found)
    from shardconv.report import plan_json, print_plan

    if as_json:
        _echo_json(plan_json(found, ocdbt=loaded.output.ocdbt))
    else:
        print_plan(found, _console(), ocdbt=loaded.output.ocdbt)


@app.command()
def run(
    config: ConfigPath,
    overrides: Set = None,
    address: Annotated[str | None, typer.Option(envvar="RAY_ADDRESS", help='A Ray cluster; "local" starts one here.')] = None,
    executor: Annotated[Literal["ray", "local"] | None, typer.Option(help="Who does the work.")] = None,
    placement: Placement = None,
    max_restarts: Annotated[int | None, typer.Option(metavar="N", help="On a mesh: how often all processes are started again.")] = None,
    check: Check = None,
    sample: Sample = None,
    trace: Trace = False,
    memory_budget: Annotated[str | None, typer.Option(metavar="SIZE", help='Memory for each worker\'s buffers, such as "2GiB".')] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Discard what an interrupted run has finished.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is already there.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Errors only.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="One line per unit.")] = False,
    json_logs: Annotated[bool, typer.Option("--json-logs", help="Progress as one JSON object per line.")] = False,
) -> None:
    """Convert. Run it again after an interruption: it goes on from what is finished."""
    if quiet and verbose:
        raise ConfigError("--quiet and --verbose exclude each other")
    flags = {
        "workers.address": address,
        "workers.executor": executor,
        "workers.max_restarts": None if max_restarts is None else str(max_restarts),
        "mesh.placement": placement,
        "workers.memory_budget": memory_budget,
        "check.mode": check,
        "check.sample": sample,
    }
    with _errors_in_log(json_logs):
        loaded = load_config(config, [*(overrides or ()), *_said(flags), *_TRACED[trace]])
        _require_use(loaded, sample, trace)
    from shardconv.conversion import run as convert

    options = RunOptions(restart=restart, overwrite=overwrite, verbosity=int(verbose) - int(quiet), json_logs=json_logs)
    convert(loaded, options)


@app.command()
def verify(
    config: ConfigPath,
    overrides: Set = None,
    check: Check = None,
    sample: Sample = None,
    trace: Trace = False,
    html: Annotated[str | None, typer.Option(metavar="FILE", help="Leave a page with plots there.")] = None,
    as_json: Json = False,
) -> None:
    """Read a finished checkpoint back and compare it with its source; exits with 4 where they differ."""
    if check == "none":
        raise ConfigError("there is nothing to verify", [Problem("--check none", 'leave it out, or say "weights", "logits" or "all"')])
    loaded = load_config(config, [*(overrides or ()), *_said({"check.mode": check, "check.sample": sample}), *_TRACED[trace]])
    _require_use(loaded, sample, trace)
    from shardconv.check_report import print_check
    from shardconv.checking import verify as compare
    from shardconv.verify.verdict import raise_if_unequal

    found = compare(loaded)
    if html is not None:
        from shardconv.page import write_page

        write_page({"source": loaded.source.path, "checkpoint": loaded.output.path, "check": found}, html)
    if as_json:
        _echo_json(found)
    else:
        print_check(found, _console())
    raise_if_unequal(found)


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A checkpoint to convert, or an Orbax checkpoint.")],
    match: Annotated[str | None, typer.Option(metavar="GLOB", help="Only names that match, such as '*.q_proj.*'.")] = None,
    prefix: Annotated[str, typer.Option(metavar="KEY", help="Of a PyTorch file with several state dicts, the key of one.")] = "",
    as_json: Json = False,
) -> None:
    """List the tensors of a checkpoint: names, shapes, dtypes, bytes, files; reads headers only."""
    from shardconv.inspecting import inspect as inspect_path
    from shardconv.report import listing_json, print_listing

    listing = inspect_path(path, match, prefix)
    if as_json:
        _echo_json(listing_json(listing))
    else:
        print_listing(listing, _console())


@app.command()
def families(as_json: Json = False) -> None:
    """List the model families."""
    from shardconv.families import families as known

    if as_json:
        _echo_json([{"name": f.name, "title": f.title, "architectures": list(f.architectures)} for f in known().values()])
        return
    table = Table("family", "models", "architectures in config.json", box=None)
    for family in known().values():
        table.add_row(family.name, family.title, ", ".join(family.architectures))
    _console().print(table)


@app.command()
def layouts() -> None:
    """List the layouts."""
    from shardconv.layouts import LAYOUTS

    table = Table("layout", "what it is", box=None)
    for name, function in LAYOUTS.items():
        table.add_row(name, (sys.modules[function.__module__].__doc__ or "").partition("\n")[0])
    table.add_row("module:make_model", "A model of your own, in Flax or Equinox, that the function makes; `init` proposes the mapping.")
    _console().print(table)


@app.command()
def init(
    hf_dir: Annotated[str, typer.Argument(metavar="HF_DIR", help="A directory with the model's config.json.")],
    layout: Annotated[str, typer.Option(help='Whose names and shapes to write: a name of `shardconv layouts`, or "module:make_model".')],
    output: Annotated[str | None, typer.Option(metavar="FILE", help="The config to write; named after HF_DIR if left out.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite it.")] = False,
) -> None:
    """Write a complete, commented config; for a model of your own, a mapping that is proposed too, from the weights' headers."""
    from shardconv.init import write_config, write_own_config
    from shardconv.porting.making import is_own

    path = output or f"{os.path.basename(os.path.abspath(hf_dir))}.toml"
    if not is_own(layout):
        write_config(hf_dir, layout, path, force)
        typer.echo(f"wrote {path}; next: shardconv plan {path}")
        return
    mapping, found = write_own_config(hf_dir, layout, path, force)
    state = f"to complete: {', '.join(found.todo)}" if found.todo else f"it settles all {found.arrays} arrays"
    typer.echo(f"wrote {path} and {mapping}; {state}; next: shardconv plan {path}")


@app.command()
def synth(
    hf_config: Annotated[str, typer.Argument(metavar="CONFIG_JSON", help="A model's config.json, or a directory with one.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The directory to write.")],
    sparse: Annotated[bool, typer.Option("--sparse", help="Headers only: files of full length that take no space.")] = False,
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
    dtype: Annotated[str, typer.Option(help="Of the weights.")] = "bfloat16",
    shard_size: Annotated[str, typer.Option(metavar="SIZE", help="The most bytes of tensors in a file.")] = "5GB",
) -> None:
    """Write a checkpoint of random weights, or of headers only, for tests and benchmarks."""
    from shardconv.synth import synthesise

    try:
        most = parse_size(shard_size)
    except ValueError as error:
        raise ConfigError("cannot write the checkpoint", [Problem(f'--shard-size "{shard_size}"', f"expected {error}")]) from None
    files, size = synthesise(hf_config, out, sparse=sparse, seed=seed, dtype=dtype, shard_bytes=most)
    from shardconv.progress import amount

    typer.echo(f"wrote {out}: {amount(size)} in {files} file{'' if files == 1 else 's'}")


@app.command()
def doctor() -> None:
    """Show versions, memory and disk, and what is wrong with them."""
    from shardconv.doctor import findings

    found = findings(os.getcwd())
    table = Table(box=None, show_header=False)
    for finding in found:
        table.add_row(finding.name, finding.value)
    _console().print(table)
    problems = [finding.problem for finding in found if finding.problem]
    if problems:
        raise ConfigError("shardconv cannot run here", problems)
