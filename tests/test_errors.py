"""Errors as collected reports, and the exit codes that scripts rely on."""

import pickle

import pytest

from shardconv.errors import CheckError, ConfigError, ExitCode, InputError, Problem, RunError, ShardconvError


def test_an_error_without_problems_is_its_title() -> None:
    assert str(ConfigError("no config given")) == "no config given"


def test_one_problem() -> None:
    error = InputError("cannot read the source", [Problem("a.safetensors is missing", "download it again")])
    assert str(error) == "cannot read the source (1 problem):\n  a.safetensors is missing\n      download it again"


def test_a_report_lists_every_problem_with_its_remedy_if_it_has_one() -> None:
    problems = (Problem("first"), Problem("second\n1 of 2", "do this\nor that"), Problem("third", "give up"))
    assert str(CheckError("two of three", iter(problems))) == "\n".join(
        [
            "two of three (3 problems):",
            "  first",
            "  second",
            "  1 of 2",
            "      do this",
            "      or that",
            "  third",
            "      give up",
        ]
    )
    assert CheckError("two of three", iter(problems)).problems == problems


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError, ExitCode.USAGE),
        (InputError, ExitCode.INPUT),
        (CheckError, ExitCode.CHECK),
        (RunError, ExitCode.RESUMABLE),
    ],
)
def test_each_kind_of_error_has_its_exit_code(error: type[ShardconvError], code: ExitCode) -> None:
    assert error("title").exit_code is code
    assert issubclass(error, ShardconvError)


def test_exit_codes_are_stable() -> None:
    assert {code.name: int(code) for code in ExitCode} == {"DONE": 0, "USAGE": 2, "INPUT": 3, "CHECK": 4, "RESUMABLE": 5}


def test_errors_travel_between_processes() -> None:
    error = pickle.loads(pickle.dumps(RunError("stopped", [Problem("a fact", "a remedy")])))
    assert type(error) is RunError
    assert (error.title, error.problems) == ("stopped", (Problem("a fact", "a remedy"),))
    assert str(error) == "stopped (1 problem):\n  a fact\n      a remedy"
