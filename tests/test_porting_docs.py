"""docs/porting.md: its code runs, in order, and what it says is printed is."""

import contextlib
import io
import re
from typing import Any

import pytest
from test_floors import ROOT

pytest.importorskip("torch")
pytest.importorskip("flax")
pytest.importorskip("equinox")

import jax

TEXT = (ROOT / "docs" / "porting.md").read_text()
BLOCKS = re.findall(r"```(python)?\n(.*?)```", TEXT, flags=re.DOTALL)


def test_every_block_runs_and_prints_what_follows_it() -> None:
    names: dict[str, Any] = {"__name__": "porting"}
    printed = ""
    shown = 0
    with jax.default_matmul_precision("highest"), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        for language, text in BLOCKS:
            if language:
                out = io.StringIO()
                with contextlib.redirect_stdout(out):
                    exec(compile(text, "porting.md", "exec"), names)
                printed = out.getvalue()
            else:
                assert printed == text
                shown += 1
    assert shown == 1 and len(BLOCKS) >= 8


def test_it_is_read_in_five_minutes() -> None:
    """At 250 words a minute, code not counted, a page of five minutes has 1250."""
    assert len(re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL).split()) < 1250


def test_what_it_names_is_there() -> None:
    assert all((ROOT / "docs" / name).exists() for name in re.findall(r"\]\(([a-z_]+\.md)\)", TEXT))
