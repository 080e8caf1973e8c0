"""Host layout: any address onto any mesh, every family bit for bit, and what is read and held for it."""

import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from algebra_oracle import World, laws, worlds
from hf_models import ONE_EACH
from hypothesis import given
from jax.sharding import NamedSharding, PartitionSpec
from mesh_cases import MESHES, bits, checkpoint, config_of, drawn, made, mesh_of, needed, plan_of, sharding_of, some_sharding

from shardconv.boxes import box_shape, box_size
from shardconv.errors import ConfigError
from shardconv.formats.reading import Reader
from shardconv.leaf import Leaf
from shardconv.mesh.host import place, require_held, tiles
from shardconv.placement import merged
from shardconv.plan import READ_GAP, Plan
from shardconv.run.work import Workspace

TILE = 512  # bytes: most leaves of a tiny model are in several tiles


@laws(0.1)
@given(worlds())
def test_any_address_lands_on_any_mesh(world: World) -> None:
    with tempfile.TemporaryDirectory() as folder:
        case = drawn(world, Path(folder))
        for leaf, wanted in case.leaves[:2]:
            sharding = some_sharding(world.dice, leaf.shape)
            with Reader(case.root, coalesce_gap=0) as reader:
                array = place(leaf, sharding, case.stored, reader, Workspace(), world.dice.choice([4, 16, 1 << 20]))
            assert array.sharding == sharding and array.dtype == np.int32
            np.testing.assert_array_equal(bits(array).view(np.int32), wanted)
            assert reader.counts.bytes_read == reader.counts.bytes_needed == 4 * (wanted > 0).sum()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: checkpoint(config_of(family), root / family) for family in ONE_EACH}


def placed(plan: Plan, leaf: Leaf, mesh: str, tile: int = TILE) -> tuple[jax.Array, Reader, Workspace]:
    workspace = Workspace()
    with Reader(plan.source.root, coalesce_gap=READ_GAP) as reader:
        array = place(leaf, sharding_of(leaf, mesh_of(MESHES[mesh][0])), plan.source.tensors, reader, workspace, tile)
    return array, reader, workspace


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unscanned"])
@pytest.mark.parametrize("layout", ["flat", "maxtext"])
@pytest.mark.parametrize("family", ONE_EACH)
def test_every_leaf_bit_for_bit_and_read_once(checkpoints: dict[str, Path], family: str, layout: str, scan: bool, mesh: str) -> None:
    plan = plan_of(checkpoints[family], layout, mesh, scan=scan)
    assert any(leaf.zeros for leaf in plan.leaves), "rows that pad the vocabulary are among them"
    for leaf in plan.leaves:
        array, reader, _ = placed(plan, leaf, mesh)
        assert array.dtype.name == leaf.dtype
        np.testing.assert_array_equal(bits(array), made(leaf, plan.source.tensors, plan.source.root))
        assert reader.counts.bytes_needed == needed(leaf), "each device asks for its own part of a row, and the row is read once"


@pytest.mark.parametrize("dtype", ["float32", "float8_e4m3fn"])
def test_values_are_converted_on_the_way(checkpoints: dict[str, Path], dtype: str) -> None:
    plan = plan_of(checkpoints["gemma2"], "maxtext", "both", dtype=dtype)
    for leaf in plan.leaves:
        array, _, _ = placed(plan, leaf, "both")
        np.testing.assert_array_equal(bits(array), made(leaf, plan.source.tensors, plan.source.root))


def test_column_shards_are_read_by_whole_rows(checkpoints: dict[str, Path]) -> None:
    plan = plan_of(checkpoints["llama"], "flat", "columns", scan=False)
    leaf = next(leaf for leaf in plan.leaves if leaf.name == "layers.1.mlp.gate")
    assert leaf.spec == ("x", None), "columns of what is stored"
    _, reader, _ = placed(plan, leaf, "columns", tile=leaf.nbytes)
    assert (reader.counts.requests, reader.counts.bytes_read) == (1, leaf.nbytes)


def test_a_shard_that_is_rows_is_read_into_place(checkpoints: dict[str, Path]) -> None:
    plan = plan_of(checkpoints["llama"], "flat", "rows", scan=False)
    mesh = mesh_of({"x": 8})
    leaf = next(leaf for leaf in plan.leaves if leaf.name == "final_norm")
    with Reader(plan.source.root, coalesce_gap=0) as reader:
        workspace = Workspace()
        array = place(leaf, NamedSharding(mesh, PartitionSpec("x")), plan.source.tensors, reader, workspace, leaf.nbytes // 8)
        assert not workspace.buffers
    np.testing.assert_array_equal(bits(array), made(leaf, plan.source.tensors, plan.source.root))


@pytest.mark.parametrize("mesh", MESHES)
def test_tiles_cover_the_boxes_once_and_keep_to_their_size(checkpoints: dict[str, Path], mesh: str) -> None:
    plan = plan_of(checkpoints["mixtral"], "maxtext", mesh)
    for leaf in plan.leaves:
        indices = sharding_of(leaf, mesh_of(MESHES[mesh][0])).devices_indices_map(leaf.shape)
        boxes = [tuple(side.indices(n)[:2] for side, n in zip(index, leaf.shape, strict=True)) for index in list(indices.values())[::2]]
        counts, wanted = np.zeros(leaf.shape, int), np.zeros(leaf.shape, int)
        for box in boxes:
            wanted[tuple(slice(*side) for side in box)] = 1
        for tile in tiles(leaf, merged(boxes), TILE):
            assert box_size(tile) * leaf.itemsize <= TILE and 0 not in box_shape(tile)
            counts[tuple(slice(*side) for side in tile)] += 1
        np.testing.assert_array_equal(counts, wanted)


def test_besides_the_shards_the_rows_of_one_tile_are_held(checkpoints: dict[str, Path]) -> None:
    plan = plan_of(checkpoints["mixtral"], "maxtext", "both", dtype="float8_e4m3fn")
    for leaf in plan.leaves:
        _, _, workspace = placed(plan, leaf, "both")
        assert workspace.buffers.keys() == {"rows"}
        assert workspace.buffers["rows"].nbytes <= TILE * leaf.rows_ratio


def test_copies_share_what_was_read(checkpoints: dict[str, Path]) -> None:
    plan = plan_of(checkpoints["qwen3"], "flat", "copies")
    for leaf in plan.leaves:
        array, reader, _ = placed(plan, leaf, "copies")
        assert len(array.addressable_shards) == 8 and array.is_fully_replicated
        assert reader.counts.bytes_needed == needed(leaf)


def test_64_bits_are_refused_where_jax_would_cut_them() -> None:
    with pytest.raises(ConfigError) as caught:
        require_held("int64")
    assert str(caught.value) == (
        "JAX does not hold this dtype (1 problem):\n"
        "  int64 is of 64 bits, and JAX would cut it to 32\n"
        '      call jax.config.update("jax_enable_x64", True) first, or ask for another dtype'
    )
