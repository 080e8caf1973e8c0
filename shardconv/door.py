"""The door: the one place where an error becomes what a user reads and an exit code.

A mistake of the user is a ShardconvError; its report goes to stderr without a traceback, and its class has the exit code. Ctrl-C is 5,
because a run that is interrupted can be resumed; at any moment, also while modules are imported, which may make another error of it. Usage
errors are typer's own, 2. Anything else is a mistake of ours: the traceback, a line that asks to report it, and 1.
"""

import sys
import traceback
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from shardconv.errors import ExitCode, ShardconvError

UNEXPECTED = 1
INTERRUPTED = "interrupted"
REPORT = "This is a mistake in shardconv, not yours. Please report it, with the lines above and what `shardconv doctor` says."


class Door(TyperGroup):
    """The group of all commands, with its errors reported."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; a ShardconvError or Ctrl-C becomes a report and a typer.Exit, before typer gives either its own code."""
        try:
            return super().invoke(ctx)
        except ShardconvError as error:
            typer.secho("error: ", fg=typer.colors.RED, nl=False, err=True)
            typer.echo(str(error), err=True)
            raise typer.Exit(int(error.exit_code)) from None
        except KeyboardInterrupt:
            typer.echo(INTERRUPTED, err=True)
            raise typer.Exit(int(ExitCode.RESUMABLE)) from None


def enter(app: typer.Typer) -> None:
    """Run the app as a program, on this process's arguments; never returns."""
    try:
        app()
    except KeyboardInterrupt:
        _leave_interrupted()
    except Exception as error:  # noqa: BLE001  the outermost frame: everything that arrives here is shown whole, and nothing goes on after it
        if _comes_of_ctrl_c(error):
            _leave_interrupted()
        traceback.print_exc()
        typer.echo(f"\n{REPORT}", err=True)
        sys.exit(UNEXPECTED)


def _leave_interrupted() -> NoReturn:
    typer.echo(INTERRUPTED, err=True)
    sys.exit(int(ExitCode.RESUMABLE))


def _comes_of_ctrl_c(error: BaseException | None) -> bool:
    """Whether an error was raised because of Ctrl-C: extension modules raise an ImportError of their own when it comes in their import."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None
