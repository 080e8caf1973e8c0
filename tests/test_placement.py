"""Placement on paper: the boxes are JAX's own, chunks lie in shards, and each is written by one position, evenly."""

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import jax
import numpy as np
import pytest
from conversions import make_config, make_source
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardconv.boxes import Box, box_shape, box_size, chunk_box, slices
from shardconv.errors import ConfigError
from shardconv.placement import device_boxes, merged
from shardconv.plan import Plan
from shardconv.planning import plan_from_config
from shardconv.sharding import MeshRules

laws = settings(deadline=None)

MESHES = ({"x": 8}, {"x": 2, "y": 4}, {"y": 4, "x": 2}, {"x": 2, "y": 2, "z": 2}, {"x": 1, "y": 8})
SPECS = ((None, None), ("x", None), (None, "x"), ("y", "x"), (("x", "y"), None), (None, ("y", "x")), (("z", "x"), "y"))


@pytest.mark.parametrize("axes", MESHES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_each_position_has_the_box_that_jax_gives_its_device(axes: dict[str, int], spec: tuple) -> None:
    names = {name for entry in spec if entry for name in ((entry,) if isinstance(entry, str) else entry)}
    if not names <= axes.keys():
        return
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(tuple(axes.values())), tuple(axes))
    shape = (16, 32)
    indices = NamedSharding(mesh, PartitionSpec(*spec)).devices_indices_map(shape)
    theirs = [tuple(side.indices(n)[:2] for side, n in zip(indices[device], shape, strict=True)) for device in mesh.devices.flat]
    assert list(device_boxes(shape, spec, MeshRules(axes, {}))) == theirs


@st.composite
def grids(draw: st.DrawFn) -> list[Box]:
    """Some cells of a grid, some of them twice."""
    sides = [draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)) for _ in range(draw(st.integers(1, 3)))]
    cells: list[Box] = [()]
    for side in sides:
        bounds = np.concatenate([[0], np.cumsum(side)]).tolist()
        cells = [(*cell, pair) for cell in cells for pair in pairwise(bounds)]
    return draw(st.lists(st.sampled_from(cells), min_size=1, max_size=12))


@laws
@given(grids())
def test_merged_boxes_cover_the_same_elements_once(boxes: list[Box]) -> None:
    shape = [max(box[dim][1] for box in boxes) for dim in range(len(boxes[0]))]
    covered, wanted = np.zeros(shape, int), np.zeros(shape, bool)
    for box in boxes:
        wanted[slices(box)] = True
    found = merged(boxes)
    for box in found:
        covered[slices(box)] += 1
    assert np.array_equal(covered, wanted.astype(int))
    assert len(found) <= len(set(boxes))


@pytest.mark.parametrize("rows", [(None, "x"), ("x", None), ("y", "x"), (None, None)])
def test_what_a_row_of_devices_has_is_one_box(rows: tuple) -> None:
    boxes = device_boxes((16, 32), rows, MeshRules({"x": 2, "y": 4}, {}))
    assert len(merged(boxes)) == 1


RULES = ('mesh.rules.vocab="tensor"', 'mesh.rules.embed="fsdp"', 'mesh.rules.heads="tensor"', 'mesh.rules.kv_heads="tensor"')
MESH = ("mesh.axes.data=2", "mesh.axes.fsdp=2", "mesh.axes.tensor=2", *RULES, 'mesh.rules.mlp=["fsdp", "tensor"]', 'mesh.placement="mesh"')


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source"))


TIGHT = ('workers.memory_budget="600KiB"', 'output.chunk_bytes="16KiB"')


def planned(root: Path, source: Path, *overrides: str) -> Plan:
    return plan_from_config(make_config(root, source, *MESH, "mesh.processes=2", *overrides))


@pytest.mark.parametrize("scanned", ["true", "false"])
@pytest.mark.parametrize("chunk", ["64MiB", "3000B"])
def test_every_chunk_lies_in_a_shard_and_is_written_once_by_one_who_has_it(tmp_path: Path, source: Path, scanned: str, chunk: str) -> None:
    plan = planned(tmp_path, source, f"target.scan_layers={scanned}", f"output.chunk_bytes={chunk}")
    written: Counter[tuple[int, int]] = Counter()
    for window in plan.windows:
        for position, number in window.units:
            for span in plan.units[number].spans:
                assert window.start <= span.leaf < window.stop
                leaf = plan.leaves[span.leaf]
                own = device_boxes(leaf.shape, leaf.spec, plan.mesh)[position]
                for chunk_number in range(span.start, span.stop):
                    box = chunk_box(leaf.shape, leaf.chunk, chunk_number)
                    assert all(a <= c and d <= b for (a, b), (c, d) in zip(own, box, strict=True))
                    assert box_shape(box) == leaf.chunk
                    written[span.leaf, chunk_number] += 1
    assert written == {(number, chunk): 1 for number, leaf in enumerate(plan.leaves) for chunk in range(leaf.chunks)}
    assert sorted(unit for window in plan.windows for _, unit in window.units) == list(range(len(plan.units)))
    assert sum(unit.bytes_written for unit in plan.units) == plan.target_bytes
    assert sum(unit.bytes_read for unit in plan.units) == sum(tensor.nbytes for tensor in plan.source.tensors.values())


def test_all_positions_write_about_as_much(tmp_path: Path, source: Path) -> None:
    plan = planned(tmp_path, source, "target.scan_layers=true", 'output.chunk_bytes="4KiB"')
    written: Counter[int] = Counter()
    for window in plan.windows:
        for position, number in window.units:
            written[position] += plan.units[number].bytes_written
    assert max(written.values()) < 1.1 * plan.target_bytes / plan.mesh.devices


@pytest.mark.parametrize("budget", ["320KiB", "640KiB", "64MiB"])
def test_windows_follow_the_budget_of_a_process(tmp_path: Path, source: Path, budget: str) -> None:
    config = make_config(tmp_path, source, *MESH, "mesh.processes=2", f'workers.memory_budget="{budget}"', 'output.chunk_bytes="16KiB"')
    plan = plan_from_config(config)
    assert plan.peak_bytes <= int(config.workers.memory_budget)
    assert (len(plan.windows) > 1) == (budget != "64MiB")
    for window in plan.windows:
        own = sum(
            box_size(box) * leaf.itemsize
            for leaf in plan.leaves[window.start : window.stop]
            for box in device_boxes(leaf.shape, leaf.spec, plan.mesh)[:4]
        )
        assert own <= int(config.workers.memory_budget)


def test_an_array_that_no_budget_holds_is_a_report(tmp_path: Path, source: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(tmp_path, source, *TIGHT, 'mesh.rules.vocab=""', 'mesh.rules.embed=""')
    assert str(caught.value) == (
        "the memory budget is too small for the mesh (1 problem):\n"
        "  embed: each of 2 processes has 512000 bytes of it, which take 1088000 while they are placed, and a process may take 614400\n"
        '      set workers.memory_budget = "2MiB" or more, split it further in mesh.rules, or use target.scan_layers = false'
    )


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ("mesh.axes.x=8", 'mesh.placement="mesh"', "mesh.processes=3"),
            (
                "  --set mesh.processes=3: [mesh] processes = 3: the mesh has 8 devices, which they do not share evenly",
                "      a divisor of 8",
            ),
        ),
        (
            ('mesh.placement="mesh"',),
            (
                '  --set mesh.placement="mesh": [mesh] placement = "mesh": the mesh has no axes',
                "      add axes = { fsdp = 8 }, with the number of devices along each",
            ),
        ),
        (
            ("mesh.axes.x=8", 'mesh.placement="gpu"'),
            (
                '  --set mesh.placement="gpu": [mesh] placement = "gpu" is not a placement',
                '      the choices are "stream", "mesh", "mesh-host", "mesh-device"',
            ),
        ),
    ],
)
def test_a_placement_that_cannot_be_is_refused(tmp_path: Path, source: Path, overrides: tuple[str, ...], said: tuple[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(tmp_path, source, *overrides)
    assert str(caught.value).splitlines()[1:] == list(said)


def test_how_arrays_come_onto_the_mesh_changes_no_facts_and_where_they_go_does(tmp_path: Path, source: Path) -> None:
    def facts(*overrides: str) -> dict[str, object]:
        return make_config(tmp_path, source, "mesh.axes.x=8", *overrides).facts()

    assert facts('mesh.placement="mesh"') == facts('mesh.placement="mesh-device"') != facts()
    assert facts("mesh.processes=2") == facts()
    assert facts('mesh.placement="mesh"', "mesh.processes=2") != facts('mesh.placement="mesh"')


def test_chunks_near_a_prime_side_are_not_single_rows(tmp_path: Path) -> None:
    from shardconv.axes import address
    from shardconv.leaf import Leaf, Part
    from shardconv.placement import chunk_in_shard
    from shardconv.values import ValueRule

    rows = 4 * 1009
    at = address("w", "vocab embed", {"vocab": rows, "embed": 8})
    part = Part("w", ("F32",), at, at, {}, ValueRule())
    leaf = Leaf(("w",), "w", (rows, 8), "float32", (rows, 8), (rows, 8), ("x", None), (part,), True, 0)
    cut = chunk_in_shard(leaf, 1009 * 8, MeshRules({"x": 4}, {}), (0, 1))
    assert cut.chunk == (1009, 2)
    assert math.prod(cut.chunk) * 4 == 1009 * 8
