"""The door: the one place where an error becomes what a user reads and an exit code.

A mistake of the user is a ShardconvError; its report goes to stderr without a traceback, and its class has the exit code. Ctrl-C is 5,
because a run that is interrupted can be resumed. Usage errors are typer's own, 2. Anything else is a mistake of ours: the traceback, a line
that asks to report it, and 1.
"""

import sys
import traceback
from typing import Any

import typer
from typer.core import TyperGroup

from shardconv.errors import ExitCode, ShardconvError

UNEXPECTED = 1
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
            typer.echo("interrupted", err=True)
            raise typer.Exit(int(ExitCode.RESUMABLE)) from None


def enter(app: typer.Typer) -> None:
    """Run the app as a program, on this process's arguments; never returns."""
    try:
        app()
    except Exception:  # noqa: BLE001  the outermost frame: everything that arrives here is shown whole, and nothing goes on after it
        traceback.print_exc()
        typer.echo(f"\n{REPORT}", err=True)
        sys.exit(UNEXPECTED)
