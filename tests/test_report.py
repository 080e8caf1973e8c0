import io
import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from conversions import make_config, make_source
from rich.console import Console

from shardconv.formats.writing import NewTensor, write_checkpoint
from shardconv.inspecting import inspect
from shardconv.plan import Plan
from shardconv.planning import plan_from_config
from shardconv.report import figures, listing_json, plan_json, print_listing, print_plan, print_summary, used_bytes
from shardconv.run import Sealed
from shardconv.run.driver import Outcome
from shardconv.run.heartbeat import WorkerState

# What scripts rely on.
STABLE = {
    "source_bytes", "target_bytes", "bytes_read", "bytes_written", "read_amplification", "write_amplification", "requests",
    "wall_seconds", "cpu_seconds", "peak_rss_bytes", "memory_budget_bytes",
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Plan:
    overrides = ('mesh.axes={fsdp=4, tensor=2}', 'mesh.rules={embed="fsdp", heads="tensor"}')
    return plan_from_config(make_config(tmp_path_factory.mktemp("plan"), source, *overrides))


def outcome(plan: Plan, pid: int = 1) -> Outcome:
    record = {"bytes_read": 600_000, "bytes_written": 510_000, "requests": 7}
    return Outcome(
        plan=plan,
        checkpoint="/out",
        records={0: record, 1: record},
        resumed=1,
        retried=2,
        workers=(WorkerState("a", 11, 9, None, 0, 1.25, 100, 3_000_000), WorkerState("b", 11, 9, None, 0, 2.0, 0, 2_000_000)),
        sealed=Sealed("0.12.8", 0, 12, 0.5, 3.0, 400_000_000),
        check=None,
        where="2 processes",
        slots=2,
        budget=64 << 20,
        stages={"plan": 0.25, "units": 2.0, "commit": 0.5},
        driver_pid=pid,
        driver_cpu_seconds=0.5,
        driver_peak_rss=50_000_000,
    )


def test_the_stable_keys_are_there_and_documented(plan: Plan) -> None:
    import shardconv.report

    found = figures(outcome(plan))
    documented = {text.split()[0] for text in (shardconv.report.__doc__ or "").splitlines() if text.startswith("    ") and text[4] != " "}
    assert documented == set(found)
    assert documented >= STABLE
    assert json.loads(json.dumps(found)) == found


def test_figures_add_up(plan: Plan, source: Path) -> None:
    found = figures(outcome(plan))
    tensors = sum(path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little") for path in source.glob("*.safetensors"))
    assert found["source_bytes"] == found["used_bytes"] == tensors == found["target_bytes"]
    assert (found["bytes_read"], found["bytes_written"], found["requests"]) == (1_200_000, 1_020_000, 14)
    assert found["read_amplification"] == pytest.approx(1_200_000 / tensors, abs=1e-6)
    assert found["write_amplification"] == pytest.approx(1_020_000 / tensors, abs=1e-6)
    assert found["wall_seconds"] == 2.75
    assert found["cpu_seconds"] == 0.5 + 1.25 + 2.0 + 3.0
    assert found["peak_rss_bytes"] == 3_000_000
    assert found["memory_budget_bytes"] == 64 << 20
    assert found["units"] == {"total": len(plan.units), "resumed": 1, "retried": 2}


def test_every_process_is_listed_once(plan: Plan) -> None:
    processes = figures(outcome(plan))["processes"]
    assert isinstance(processes, list)
    assert [(p["role"], p["host"], p["pid"]) for p in processes] == [
        ("driver", socket.gethostname(), 1), ("worker", "a", 11), ("worker", "b", 11), ("commit", socket.gethostname(), 12),
    ]  # fmt: skip


def test_a_driver_that_is_its_own_worker_counts_once(plan: Plan) -> None:
    import os

    alone = WorkerState(socket.gethostname(), os.getpid(), 1, None, 0, 0.4, 1, 5_000_000)
    found = figures(replace(outcome(plan, os.getpid()), workers=(alone,)))
    assert found["cpu_seconds"] == 0.5 + 3.0
    assert [p["role"] for p in found["processes"]] == ["worker", "commit"]  # type: ignore[attr-defined]


def test_the_summary_says_what_it_took(plan: Plan) -> None:
    out = io.StringIO()
    found = figures(outcome(plan))
    print_summary(found, Console(file=out, width=200))
    target = f"{plan.target_bytes / 1000:.1f} kB"
    assert out.getvalue().splitlines() == [
        f"checkpoint  /out, {target} in 1 unit, 1 by earlier runs, 2 attempts failed",
        "time        2.8 s (plan 0.2, units 2.0, commit 0.5)",
        "cpu         6.8 s in all processes; units by 2 processes",
        f"read        1.20 MB in 14 requests, {found['read_amplification']:.2f} x what is used",
        f"written     1.02 MB, {found['write_amplification']:.2f} x the target",
        "memory      heaviest worker 3.00 MB, of which buffers may take 67.1 MB",
    ]


def test_the_summary_of_a_run_that_had_nothing_left_to_do(plan: Plan) -> None:
    out = io.StringIO()
    found = figures(replace(outcome(replace(plan, notes=("a note [of] the plan",))), workers=(), where="nobody", retried=1))
    found["units"] = {"total": 1, "resumed": 1, "retried": 1}
    print_summary(found, Console(file=out, width=200, markup=False))
    lines = out.getvalue().splitlines()
    assert lines[0].endswith(" in 1 unit, 1 by earlier runs, 1 attempt failed")
    assert lines[2] == "cpu         3.5 s in all processes"
    assert lines[5:] == ["memory      no workers were needed", "note        a note [of] the plan"]


def test_tensors_that_nothing_uses_are_not_used(plan: Plan) -> None:
    without = replace(plan, leaves=tuple(leaf for leaf in plan.leaves if leaf.name != "embed"))
    assert used_bytes(plan) - used_bytes(without) == 1000 * 64 * 2


def test_a_plan_as_data(plan: Plan) -> None:
    found = plan_json(plan, ocdbt=True)
    assert json.loads(json.dumps(found)) == found
    assert found["read_amplification"] == 1.0
    assert (found["units"], found["unmapped"], found["missing"]) == (1, [], [])
    assert found["peak_bytes_per_worker"] == plan.peak_bytes
    leaves = {leaf["name"]: leaf for leaf in found["leaves"]}  # type: ignore[attr-defined]
    query = leaves["layers.2.attn.q"]
    assert query["sources"][0]["name"] == "model.layers.{layers}.self_attn.q_proj.weight"
    assert query["sources"][0]["dims"].endswith(" embed")
    assert (query["template"], query["dtype"], query["value"]) == ("layers.{layers}.attn.q", "bfloat16", "exact")
    assert query["shape"] == [64, 4, 16]
    assert query["partition_spec"] == ["fsdp", "tensor", None]
    assert query["bytes"] == 64 * 64 * 2


def test_a_plan_for_people(plan: Plan) -> None:
    out = io.StringIO()
    print_plan(plan, Console(file=out, width=250), ocdbt=True)
    text = out.getvalue()
    (query,) = [row for row in text.splitlines() if row.startswith("layers.{layers}.attn.q ")]
    for part in ("x 4", "model.layers.{layers}.self_attn.q_proj.weight", "64 x 4 x 16", "bfloat16", "exact", "(fsdp, tensor, -)"):
        assert part in query
    assert "1.00 x what is used" in text
    assert "mesh    fsdp 4, tensor 2" in text
    assert f"{plan.peak_bytes / 1000:.1f} kB of buffers per worker" in text


def test_a_plan_on_a_narrow_terminal_breaks_between_facts_and_not_inside_them(plan: Plan) -> None:
    out = io.StringIO()
    print_plan(plan, Console(file=out, width=80), ocdbt=True)
    lines = out.getvalue().splitlines()
    start = lines.index("layers.{layers}.attn.q x 4")
    assert lines[start + 1 : start + 4] == [
        "    model.layers.{layers}.self_attn.q_proj.weight",
        "    (heads head_dim) embed -> embed heads head_dim",
        "    64 x 4 x 16 bfloat16, exact, (fsdp, tensor, -)",
    ]


def test_a_store_without_ocdbt_has_a_file_per_chunk(plan: Plan) -> None:
    chunks = sum(leaf.chunks for leaf in plan.leaves)
    assert plan_json(plan, ocdbt=False)["files_to_write"] == 6 + chunks + len(plan.leaves)


def test_alike_leaves_share_a_line_only_if_they_are_alike(plan: Plan) -> None:
    odd = tuple(replace(leaf, dtype="float32") if leaf.name == "layers.2.attn.q" else leaf for leaf in plan.leaves)
    out = io.StringIO()
    print_plan(replace(plan, leaves=odd), Console(file=out, width=250), ocdbt=True)
    rows = [row for row in out.getvalue().splitlines() if row.startswith("layers.{layers}.attn.q ")]
    assert len(rows) == 2
    assert any("x 3" in row and "bfloat16" in row for row in rows)


def test_a_listing_as_data_and_for_people(source: Path) -> None:
    listing = inspect(str(source), "*layers.1.*norm*")
    found = listing_json(listing)
    assert found["total"] == {"tensors": 2, "bytes": 2 * 64 * 2, "files": 1}
    first = found["tensors"][0]  # type: ignore[index]
    assert first["name"].startswith("model.layers.1.")
    assert (first["shape"], first["dtype"], first["bytes"]) == ([64], "BF16", 128)
    out = io.StringIO()
    print_listing(listing, Console(file=out, width=200))
    lines = out.getvalue().splitlines()
    assert len(lines) == 4
    assert "128" in lines[1]
    assert lines[-1] == "2 tensors, 256 B, 1 file, safetensors"


def shown(path: Path, match: str | None, width: int) -> list[str]:
    out = io.StringIO()
    print_listing(inspect(str(path), match), Console(file=out, width=width))
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_a_listing_on_a_narrow_terminal_has_two_lines_for_each_tensor(source: Path) -> None:
    assert shown(source, "*.1.*q_proj*", 80) == [
        "model.layers.1.self_attn.q_proj.weight",
        "    64 x 64 BF16, 8,192 bytes, in model-00003-of-00004.safetensors",
        "1 tensor, 8.19 kB, 1 file, safetensors",
    ]


def test_layer_2_is_listed_before_layer_10(tmp_path: Path) -> None:
    names = ["l.0.w", "l.2.w", "l.10.w", "l.10.w2", "l.10.w10"]
    tensors = [NewTensor(name, "F32", (1,)) for name in sorted(names)]
    write_checkpoint(tmp_path, tensors, None, max_file_bytes=1 << 20, metadata={})
    assert [entry.name for entry in inspect(str(tmp_path), None).entries] == names


@pytest.mark.parametrize(("match", "hint"), [("q_proj", '; a glob needs stars: "*q_proj*"'), ("*nothing*", "")])
def test_a_glob_that_matches_nothing_is_told(source: Path, match: str, hint: str) -> None:
    assert shown(source, match, 200)[-1] == f'note: no name matches "{match}"{hint}'
