"""report.html: what it says, that it is well formed whatever is in the report, and that its plots are drawn within their frames."""

import copy
import math
import re
from collections import Counter
from collections.abc import Iterator
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from conversions import make_config, make_source
from hypothesis import given
from hypothesis import strategies as st

from shardconv.config import RunOptions
from shardconv.conversion import _leave_page, run
from shardconv.errors import ConfigError
from shardconv.page import page, write_page
from shardconv.page.svg import WIDTH, Scale, decades, thinned, ticks
from shardconv.run import Finished, Note, Told
from shardconv.run.job import state_path
from shardconv.throughput import SLICES, throughput

Element = ElementTree.Element
GB = 10**9


def difference(max_abs: float) -> dict[str, Any]:
    return {
        "positions": 320, "max_abs": max_abs, "mean_abs": max_abs / 9, "max_kl": max_abs**2, "mean_kl": max_abs**2 / 40,
        "cosine": 1 - max_abs**2, "top1": 1.0, "top5": 0.998,
    }  # fmt: skip


WEIGHTS: dict[str, Any] = {
    "mode": "weights", "equal": True, "problems": [], "notes": ["3 infinite values"], "independent": True, "leaves": 12,
    "leaves_rounded": 0, "elements": 513_590_784, "bytes": 1_027_181_568, "whole": True, "boxes": 25, "seed": 7, "checksums": 12,
    "nan": 0, "inf": 3, "workers": 2, "pid": 31, "seconds": 6.294, "cpu_seconds": 6.83, "peak_rss_bytes": 287_191_040,
}  # fmt: skip

LOGITS: dict[str, Any] = {
    "equal": True, "problems": [], "notes": ["computed in float32"], "forward": "auto", "sequences": [64, 96, 160], "seed": 7,
    "prompts": "prompts.txt",
    "differences": {
        "jax": difference(3e-3), "judged": difference(2.31e-5), "reordered": difference(2.1e-5), "rounded": difference(3e-3),
        "bfloat16": difference(0.131),
    },
    "bounds": {"max_abs": 8.4e-5, "mean_abs": 9.3e-6, "max_kl": 5.1e-10, "factor": 4.0},
    "perplexity": 33120.51, "reference_perplexity": 33120.49,
    "worst": {"sequence": 2, "position": 131, "token": 20117, "found": 3.21771, "reference": 3.21774},
    "unjudged": 12,
    "blocks": [{"step": f"block {n}", "max_abs": 1e-7 * 2**n, "floor": 1.2e-7 * 2**n, "scale": 1.5**n} for n in range(16)],
    "divergence": {"step": "block 5", "part": "q", "max_abs": 0.02, "floor": 3e-6},
    "scatter": [[n / 5 - 3, n / 5 - 3 + 1e-5 * (n % 7)] for n in range(30)],
    "unrouted": [{"block": 3, "experts": [1, 17]}],
    "unseen": [{"what": "experts", "arrays": ["layers.experts.{gate,up}[3, [1, 17]]"], "why": "no judged token", "count": 2, "total": 512}],
    "platform": "cpu", "devices": 8, "mesh": {"fsdp": 4, "tensor": 2}, "layer_by_layer": True, "pid": 32, "seconds": 31.2,
    "cpu_seconds": 55.0, "peak_rss_bytes": 2_900_000_000,
}  # fmt: skip

REPORT: dict[str, Any] = {
    "source": "/data/models/danube", "family": "llama", "layout": "flat",
    "source_bytes": GB, "target_bytes": 2 * GB, "bytes_read": GB, "bytes_written": 2 * GB, "read_amplification": 1.0,
    "write_amplification": 1.000028, "requests": 149, "wall_seconds": 26.7, "cpu_seconds": 16.6, "peak_rss_bytes": 314_064_896,
    "memory_budget_bytes": 256 << 20, "used_bytes": GB, "units": {"total": 22, "resumed": 5, "retried": 1},
    "stages": {"plan": 0.02, "prepare": 0.03, "start": 11.9, "units": 6.2, "commit": 1.4, "check": 7.2, "close": 0.0},
    "throughput": {"slice_seconds": 0.62, "bytes": [100_000_000 + 1_000_000 * (n % 9) for n in range(10)]},
    "processes": [
        {"role": "driver", "host": "vm", "pid": 1, "cpu_seconds": 2.2, "peak_rss_bytes": 122_777_600},
        {"role": "worker", "host": "node-1", "pid": 2, "cpu_seconds": 2.9, "peak_rss_bytes": 312_909_824},
        {"role": "worker", "host": "node-2", "pid": 3, "cpu_seconds": 2.6, "peak_rss_bytes": 314_064_896},
    ],
    "executor": "Ray on this machine", "workers": 2, "checkpoint": "/data/out/danube-flat",
    "versions": {"shardconv": "0.1.0", "python": "3.11.7"},
    "check": {"mode": "all", "equal": True, "problems": [], "weights": WEIGHTS, "logits": LOGITS},
    "notes": ["lm_head.weight is tied"],
}  # fmt: skip


def parsed(report: dict[str, Any]) -> Element:
    """The page as a tree; raises where it is not well formed."""
    doctype, _, rest = page(report).partition("\n")
    assert doctype == "<!DOCTYPE html>"
    return ElementTree.fromstring(rest)


def said(tree: Element) -> str:
    """All text but the style sheet, one line for each element."""
    return "\n".join(" ".join(node.itertext()) for node in tree.iter() if node.tag in {"p", "li", "tr", "h1", "h2", "h3", "strong", "text"})


def with_check(**changes: Any) -> dict[str, Any]:
    return {**REPORT, "check": {**REPORT["check"], **changes}}


def with_logits(**changes: Any) -> dict[str, Any]:
    return with_check(logits={**LOGITS, **changes})


def plots(tree: Element) -> dict[str, Element]:
    """The plots by name, each sound: it has a title and a description of its own, and all of it is finite and within its frame."""
    found = {}
    for svg in tree.iter("svg"):
        title, description = svg.find("title"), svg.find("desc")
        assert title is not None and title.text and description is not None and description.text
        assert svg.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}" and svg.get("role") == "img"
        left, top, width, height = map(float, (svg.get("viewBox") or "").split())
        for x, y, what in places(svg):
            assert left <= x <= left + width and top <= y <= top + height, (title.text, what, x, y)
        for one, other in combinations(map(box_of, svg.iter("text")), 2):
            assert one[1] <= other[0] or other[1] <= one[0] or abs(one[2] - other[2]) >= 10, (title.text, one, other)
        found[title.text] = svg
    identities = Counter(node.get("id") for node in tree.iter() if node.get("id"))
    assert set(identities.values()) <= {1}
    return found


def box_of(node: Element) -> tuple[float, float, float, str]:
    """Where a text begins, ends and stands, as far as its width can be told."""
    said, at = node.text or "", float(node.get("x", "nan"))
    width = 5.5 * len(said)
    left = at - {None: 0.0, "middle": 0.5, "end": 1.0}[node.get("text-anchor")] * width
    return left, left + width, float(node.get("y", "nan")), said


def places(svg: Element) -> Iterator[tuple[float, float, str]]:
    """Corners of everything in a plot."""
    for node in svg.iter():
        at = {key: float(value) for key, value in node.items() if key in {"x", "y", "x1", "x2", "y1", "y2", "width", "height"}}
        assert all(map(math.isfinite, at.values())), (node.tag, at)
        if node.tag == "line":
            yield from ((at["x1"], at["y1"], "line"), (at["x2"], at["y2"], "line"))
        elif node.tag == "rect":
            yield from ((at["x"], at["y"], "bar"), (at["x"] + at["width"] - 1, at["y"] + at["height"], "bar"))
        elif node.tag == "path":
            assert re.fullmatch(r"(?:[ML]-?[\d.]+ -?[\d.]+(?:h0)?)+", node.get("d", "")), node.get("d")
            numbers = [float(number) for number in re.findall(r"-?[\d.]+", (node.get("d") or "").replace("h0", ""))]
            yield from ((x, y, "path") for x, y in zip(numbers[::2], numbers[1::2], strict=True))
        elif node.tag == "text":
            left, right, level, said = box_of(node)
            yield from ((left, level, said), (right, level, said))


# ------------------------------------------------------------------------------------------------------------ what it says


def test_a_page_says_what_report_json_says() -> None:
    tree = parsed(REPORT)
    lines = said(tree).splitlines()
    assert lines[0] == "danube → danube-flat"
    for line in (
        "converted llama, 1.00 GB into flat, 2.00 GB",
        "read 1.00 GB in 149 requests, 1.00 x what is used",
        "written 2.00 GB, 1.00 x the target",
        "time 26.7 s, 16.6 s of CPU in all processes",
        "memory heaviest worker 314.1 MB; buffers may take 268.4 MB",
        "workers Ray on this machine, 2 at a time",
        "units 22, of which 5 were finished by earlier runs; 1 attempt failed and was made again",
        "versions shardconv 0.1.0, python 3.11.7",
        "lm_head.weight is tied",
        "leaves 12, all exact",
        "elements 513,590,784, 1.03 GB",
        "checksums 12 made again",
        "NaN, infinite 0 and 3 values",
        "3 infinite values",
        "checkpoint allowed noise floor rounding bfloat16 unrounded",
        "largest difference 2.31 × 10⁻⁵ 8.40 × 10⁻⁵ 2.10 × 10⁻⁵ 0.00300 0.131 0.00300",
        "cosine 1.0000000 1.0000000 0.9999910 0.9828390 0.9999910",
        "same five likeliest 99.8% 99.8% 99.8% 99.8% 99.8%",
        "perplexity 33120.51, of the source 33120.49",
        "sequences 3 of 64, 96, 160 tokens: random tokens (seed 7), and prompts.txt",
        "furthest apart 3.21771, of the source 3.21774: sequence 2, position 131, token 20117",
        "first departs q of block 5: by 0.0200, and the noise there is 3.00 × 10⁻⁶",
        "computed on 8 x cpu, mesh fsdp 4, tensor 2, layer by layer",
        "3 1, 17",
        "2 of 512 experts (layers.experts.{gate,up}[3, [1, 17]]): no judged token",
        "of these the logits say nothing: the check of the weights has compared them, bit by bit",
    ):
        assert line in lines, line
    assert set(plots(tree)) == {"Stages", "Throughput", "Memory", "Difference by layer", "Logits"}


PROBLEM = {"fact": "layers.mlp.gate[0] is 1, and should be 2", "remedy": "up_proj stands where gate_proj should"}


@pytest.mark.parametrize(
    ("check", "kind", "lines"),
    [
        (None, "unchecked", ["Not checked", "Nobody compared what was written with its source: `shardconv verify` does."]),
        (
            REPORT["check"],
            "equal",
            [
                "Equal",
                "Weights equal: all 513,590,784 elements of 12 leaves.",
                "Logits equal: they differ by 2.31 × 10⁻⁵ at most, and 8.40 × 10⁻⁵ is allowed, over 320 positions.",
            ],
        ),
        (
            {**REPORT["check"], "logits": None, "weights": {**WEIGHTS, "whole": False, "independent": False}},
            "equal",
            [
                "Equal",
                "Weights equal: 513,590,784 elements of 12 leaves, in 25 boxes of a sample (seed 7); "
                "not by an independent statement of this model.",
                "The logits were not compared.",
            ],
        ),
        (
            {
                "mode": "all",
                "equal": False,
                "problems": [PROBLEM, PROBLEM],
                "weights": {**WEIGHTS, "equal": False, "problems": [PROBLEM]},
                "logits": {**LOGITS, "equal": False, "problems": [PROBLEM], "differences": {"judged": difference(4.71)}},
            },
            "differs",
            [
                "Differs: 2 problems",
                "Weights differ in 1 place: all 513,590,784 elements of 12 leaves.",
                "Logits differ: they differ by 4.71 at most, and 8.40 × 10⁻⁵ is allowed, over 320 positions.",
                "What differs",
                "layers.mlp.gate[0] is 1, and should be 2 up_proj stands where gate_proj should",
            ],
        ),
        (
            {
                "mode": "logits",
                "equal": False,
                "problems": [PROBLEM],
                "weights": None,
                "logits": {"equal": False, "problems": [PROBLEM], "notes": []},
            },
            "differs",
            ["Differs: 1 problem", "The weights were not compared.", "Logits not compared: the checkpoint could not be computed with."],
        ),
        (WEIGHTS, "equal", ["Equal", "Weights equal: all 513,590,784 elements of 12 leaves.", "The logits were not compared."]),
    ],
    ids=["none", "equal", "sampled", "differs", "no-logits", "first-version"],
)
def test_the_verdict_comes_first_and_in_words(check: dict[str, Any] | None, kind: str, lines: list[str]) -> None:
    tree = parsed({**REPORT, "check": check})
    (banner,) = (node for node in tree.iter("div") if (node.get("class") or "").startswith("verdict"))
    assert banner.get("class") == f"verdict {kind}"
    body = tree.find("body")
    assert body is not None and list(body).index(banner) == 1
    assert ["".join(line.itertext()) for line in banner] == lines[: len(banner)]
    assert set(lines) <= set(said(tree).splitlines())


def test_a_model_in_hugging_faces_cache_goes_by_its_name() -> None:
    source = "/home/a/.cache/huggingface/hub/models--meta-llama--Llama-3.1-8B/snapshots/0e9e39f249a16976918f6564b8830bc894c89659"
    assert said(parsed({**REPORT, "source": source})).splitlines()[0] == "meta-llama/Llama-3.1-8B → danube-flat"


def test_where_nothing_is_rounded_no_columns_are_about_rounding() -> None:
    differences = {**LOGITS["differences"], "rounded": difference(0.0)}
    lines = said(parsed(with_logits(differences=differences))).splitlines()
    assert "checkpoint allowed noise floor bfloat16" in lines
    assert not [line for line in lines if line.startswith(("rounding:", "unrounded:"))]


def test_it_needs_nothing_else() -> None:
    text, tree = page(REPORT), parsed(REPORT)
    assert not re.search(r"https?:|@import|url\(", text)
    assert {node.tag for node in tree.iter()}.isdisjoint({"script", "link", "img", "iframe", "object", "use", "image"})
    assert not [node for node in tree.iter() if {"src", "href"} & set(node.keys()) or any(key.startswith("on") for key in node.keys())]
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    styled = set(re.findall(r"\.([a-z]+)", tree.findtext("head/style") or ""))
    assert {word for node in tree.iter() for word in (node.get("class") or "").split()} <= styled | {"tick", "axis", "throughput"}


# ------------------------------------------------------------------------------------------------ whatever is in the report

EVIL = "</style><script>alert('1')</script><b title=\"x\">&amp;\x00\x1b[31m\udcff"


def map_strings(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: map_strings(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [map_strings(inner) for inner in value]
    return f"{EVIL}{value}" if isinstance(value, str) else value


def test_text_from_outside_never_becomes_markup(tmp_path: Path) -> None:
    report = map_strings(with_check(problems=[PROBLEM], equal=False))
    report["stages"][EVIL] = 1.0
    report["versions"][EVIL] = "1"
    report["check"]["logits"]["mesh"][EVIL] = 4
    ours, theirs = parsed(REPORT), parsed(report)
    plots(ours)
    assert {node.tag for node in theirs.iter()} <= {node.tag for node in ours.iter()} | {"ul", "li", "h2", "span"}
    shown = "</style><script>alert('1')</script><b title=\"x\">&amp;\ufffd\ufffd[31m\ufffd"
    text = "".join(theirs.itertext())
    for part in ("danube", "llama", "node-1", "block 5", "prompts.txt", "lm_head.weight is tied", "up_proj stands"):
        assert shown in text and part in text
    write_page(report, str(tmp_path / "report.html"))
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page(report)


def paths_of(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every key of nested data, and the first and last of its lists."""
    if isinstance(value, dict):
        items: list[tuple[str | int, Any]] = list(value.items())
    elif isinstance(value, list):
        items = [(0, value[0]), (len(value) - 1, value[-1])] if value else []
    else:
        items = []
    for key, inner in items:
        if not isinstance(key, int):
            yield (*path, key)
        yield from paths_of(inner, (*path, key))


def without(report: dict[str, Any], path: tuple[str | int, ...]) -> dict[str, Any]:
    found = copy.deepcopy(report)
    at: Any = found
    for key in path[:-1]:
        at = at[key]
    del at[path[-1]]
    return found


def test_a_report_that_lacks_a_key_has_a_page() -> None:
    keys = list(paths_of(REPORT))
    assert len(keys) > 100
    for path in keys:
        plots(parsed(without(REPORT, path)))
    plots(parsed({}))


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, None, "nan"])
def test_what_is_no_number_is_said_and_never_drawn(odd: object) -> None:
    blocks = copy.deepcopy(LOGITS["blocks"])
    blocks[3]["max_abs"], blocks[9]["floor"] = odd, odd
    differences = {name: {**one, "max_abs": odd, "cosine": odd, "top1": odd} for name, one in LOGITS["differences"].items()}
    scatter = [*LOGITS["scatter"], [1.0, odd], [odd, 1.0]]
    tree = parsed(with_logits(blocks=blocks, differences=differences, scatter=scatter, perplexity=odd))
    assert set(plots(tree)) >= {"Difference by layer", "Logits"}
    assert "30 logits of both sides" in said(tree) and "2 more are no numbers" in said(tree)
    word = {math.inf: "infinite", -math.inf: "−infinite"}.get(odd, "not a number") if isinstance(odd, float) else "not a number"
    assert f"perplexity {word}, of the source" in said(tree)
    assert f"cosine {word}" in said(tree)


def test_nothing_took_any_time() -> None:
    still = dict.fromkeys(REPORT["stages"], 0.0)
    tree = parsed({**REPORT, "stages": still, "throughput": {"slice_seconds": 0.0, "bytes": []}, "wall_seconds": 0.0})
    assert set(plots(tree)) == {"Stages", "Memory", "Difference by layer", "Logits"}


def test_a_run_that_only_commits_has_no_throughput_and_no_workers() -> None:
    tree = parsed({**REPORT, "throughput": throughput([], {}), "processes": REPORT["processes"][:1], "peak_rss_bytes": 0, "workers": 0})
    assert set(plots(tree)) == {"Stages", "Memory", "Difference by layer", "Logits"}
    assert "workers none were needed" in said(tree)
    assert "No workers were needed" in said(tree)


@pytest.mark.parametrize("value", [0.0, 3e-9, 1.0, 4e30])
def test_steps_and_logits_that_are_all_alike_can_be_drawn(value: float) -> None:
    blocks = [{"step": "block 0", "max_abs": value, "floor": value}]
    drawn = plots(parsed(with_logits(blocks=blocks, scatter=[[value, value]], divergence=None)))
    assert "Difference by layer" in drawn
    frame, dot = (next(node for node in drawn["Logits"].iter() if node.get("class") == kind) for kind in ("diagonal", "dots"))
    at = float((dot.get("d") or "")[1:].split()[0])
    assert float(frame.get("x1", "nan")) < at < float(frame.get("x2", "nan"))


def test_a_cluster_shows_its_heaviest_processes_and_those_over_the_budget() -> None:
    name = "node-{:04d}.one-of-the-clusters.internal.example.com"
    hosts = [{"role": "worker", "host": name.format(n), "pid": 10**6 + n, "peak_rss_bytes": (200 + n) << 20} for n in range(1000)]
    tree = parsed({**REPORT, "processes": hosts, "memory_budget_bytes": 1095 << 20})
    bars = [node.get("class") for node in plots(tree)["Memory"].iter("rect")]
    assert bars == ["bar over"] * 9 + ["bar"] * 3  # the budget and the interpreter make 1190.4 MiB, the heaviest has 1199
    assert "The 12 heaviest of 1000 processes are shown" in said(tree)


def test_the_step_that_departs_is_marked() -> None:
    def marks(divergence: object) -> list[str | None]:
        drawn = plots(parsed(with_logits(divergence=divergence)))["Difference by layer"]
        return [node.text for node in drawn.iter("text") if node.get("class") == "alarm"]

    assert marks(LOGITS["divergence"]) == ["departs: block 5"]
    assert marks({"step": "block 15", "part": None, "max_abs": 1.0, "floor": 0.1}) == ["departs: block 15"]
    assert marks(None) == []


def test_blocks_stand_over_their_own_numbers() -> None:
    def below(*steps: str) -> list[str | None]:
        blocks = [{"step": step, "max_abs": 1e-6, "floor": 1e-6} for step in steps]
        drawn = plots(parsed(with_logits(blocks=blocks, divergence=None)))["Difference by layer"]
        return [node.text for node in drawn.iter("text") if node.get("class") in ("tick", "axis") and node.get("text-anchor") != "end"]

    def where(*steps: str) -> list[float]:
        drawn = plots(parsed(with_logits(blocks=[{"step": step, "max_abs": 1.0} for step in steps])))["Difference by layer"]
        return [float(node.get("x", "nan")) for node in drawn.iter("text") if node.get("text-anchor") == "middle"]

    assert below("embed", *(f"block {n}" for n in range(32)), "logits")[1:] == ["0", "10", "20", "30"]
    assert below("embed", "out")[1:] == ["0", "1"]
    first, last = where("embed", "block 0", "block 1", "logits")
    assert where("a", "b", "c", "d")[1] == pytest.approx(first) and where("a", "b", "c", "d")[2] == pytest.approx(last)


def test_a_page_that_cannot_be_written_is_a_mistake_of_the_users_or_a_note(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        write_page(REPORT, str(tmp_path / "none" / "report.html"))
    said = f"cannot write the page (1 problem):\n  {tmp_path}/none/report.html: No such file or directory"
    assert str(caught.value) == said

    class Ear:
        heard: list[Told]

        def hear(self, told: Told) -> None:
            self.heard = [told]

    ear = Ear()
    _leave_page(REPORT, str(tmp_path / "none"), ear)
    assert ear.heard == [Note(said)]


# ----------------------------------------------------------------------------------------------------------------- of a run


def test_a_run_leaves_its_page_beside_its_report(tmp_path: Path) -> None:
    config = make_config(tmp_path, make_source(tmp_path))
    found = run(config, RunOptions(restart=False, overwrite=False, verbosity=-1, json_logs=False))
    state = Path(state_path(config.output.path))
    text = (state / "report.html").read_text(encoding="utf-8")
    assert text == page(found)
    assert sorted(path.name for path in state.iterdir()) == ["report.html", "report.json"]
    tree = parsed(found)
    assert set(plots(tree)) == {"Stages", "Throughput", "Memory"}
    assert said(tree).splitlines()[0] == "source → out"
    assert "Weights equal: all" in said(tree)
    assert sum(found["throughput"]["bytes"]) == pytest.approx(found["target_bytes"], rel=1e-3)  # type: ignore[index]


def done(unit: int, seconds: float) -> Finished:
    return Finished(unit, f"u{unit}", 0, 0, 0, seconds, 0, 1, "a")


def test_throughput_of_units_side_by_side() -> None:
    found = throughput([(5.0, done(0, 5.0)), (10.0, done(1, 10.0)), (10.0, done(2, 5.0))], {0: 500, 1: 1000, 2: 1500})
    made = found["bytes"]
    assert found["slice_seconds"] == 0.1 and isinstance(made, list)
    assert made == [20] * 50 + [40] * 50


@given(st.lists(st.tuples(st.floats(1e-3, 1e5), st.floats(0, 1e5), st.integers(0, 10**12)), max_size=20))
def test_throughput_loses_no_byte(units: list[tuple[float, float, int]]) -> None:
    finished = [(end, done(number, seconds)) for number, (end, seconds, _) in enumerate(units)]
    made = throughput(finished, {number: size for number, (_, _, size) in enumerate(units)})["bytes"]
    assert isinstance(made, list)
    assert len(made) == (SLICES if units else 0)
    assert all(nbytes >= 0 for nbytes in made)
    assert sum(made) == pytest.approx(sum(size for *_, size in units), rel=1e-6, abs=SLICES)


# ------------------------------------------------------------------------------------------------------------------- scales


@given(st.floats(-1e5, 1e5), st.floats(1e-9, 1e12))
def test_ticks_are_few_even_and_on_the_scale(low: float, span: float) -> None:
    low, high = low * span, low * span + span
    found = ticks(low, high)
    slack = 1e-6 * span
    assert 1 <= len(found) <= 5
    assert all(low - slack <= at <= high + slack for at in found)
    steps = [b - a for a, b in pairwise(found)]
    assert all(step > 0 for step in steps) and (not steps or max(steps) == pytest.approx(min(steps), rel=1e-3))


@given(st.floats(1e-30, 1e30), st.floats(1e-30, 1e30))
def test_decades_enclose_and_thin_out(a: float, b: float) -> None:
    low, high = sorted((a, b))
    found = decades(low, high)
    assert found[0] <= low * (1 + 1e-6) and high <= found[-1] * (1 + 1e-6)
    assert 1 <= len(thinned(found)) <= 7 and set(thinned(found)) <= set(found)


def test_a_scale_keeps_to_its_ends() -> None:
    linear, log = Scale(0, 10, 100, 0), Scale(1e-6, 1e-2, 0, WIDTH, log=True)
    assert [linear.at(value) for value in (-5, 0, 5, 10, 15)] == [100, 100, 50, 0, 0]
    assert [round(log.at(value)) for value in (0.0, 1e-7, 1e-6, 1e-4, 1e-2, 1.0)] == [0, 0, 0, 200, 400, 400]
    assert Scale(3, 3, 0, 10).at(3) == 0
