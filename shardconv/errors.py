"""What a user can do wrong, as one collected report.

An error is a title and a list of problems. A problem is a fact (which file, which key, which numbers) and a remedy (what to type or
change). Checks collect every problem before they raise, so a user mends a checkpoint or a config once, not once per message. The class
decides the exit code; scripts may rely on the numbers.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar

# Characters of a line of a message: a dozen lines of a terminal. What is longer is a file's own text, such as a name of a megabyte.
LINE = 2000


class ExitCode(IntEnum):
    """What the process exits with; stable."""

    DONE = 0
    USAGE = 2
    INPUT = 3
    CHECK = 4
    RESUMABLE = 5


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: the fact, and what to do about it."""

    fact: str
    remedy: str = ""


class ShardconvError(Exception):
    """A title and its problems, rendered as an indented report.

    >>> print(InputError("cannot read the source", [Problem("a.safetensors is missing", "download it again")]))
    cannot read the source (1 problem):
      a.safetensors is missing
          download it again
    """

    exit_code: ClassVar[ExitCode]

    def __init__(self, title: str, problems: Iterable[Problem] = ()) -> None:
        self.title = title
        self.problems = tuple(problems)
        super().__init__(title, self.problems)

    def __str__(self) -> str:
        if not self.problems:
            return _safe(self.title)
        count = len(self.problems)
        lines = [f"{self.title} ({count} problem{'s' if count > 1 else ''}):"]
        for problem in self.problems:
            lines.append("  " + problem.fact.replace("\n", "\n  "))
            if problem.remedy:
                lines.append("      " + problem.remedy.replace("\n", "\n      "))
        return _safe("\n".join(lines))


def _safe(text: str) -> str:
    """A message as a terminal can be given it, since it has other people's words in it.

    >>> _safe("a" + chr(27) + "[2J" + chr(10) + "b")
    'a\\\\x1b[2J\\nb'
    """
    lines = (line if len(line) <= LINE else line[:LINE] + "..." for line in text.split("\n"))
    return "\n".join(line if line.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in lines)


class ConfigError(ShardconvError):
    """The command line or the config is wrong."""

    exit_code = ExitCode.USAGE


class InputError(ShardconvError):
    """The source cannot be read, or it is not what the family says."""

    exit_code = ExitCode.INPUT


class CheckError(ShardconvError):
    """What was written is not what it should be."""

    exit_code = ExitCode.CHECK


class RunError(ShardconvError):
    """The run stopped; what is finished stays, and the same command goes on from there."""

    exit_code = ExitCode.RESUMABLE
