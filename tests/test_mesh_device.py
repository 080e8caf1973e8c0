"""Device layout: any address onto any mesh, every family bit for bit, one function for each kind of leaf, and each byte read once."""

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from algebra_oracle import World, laws, worlds
from hf_models import ONE_EACH
from hypothesis import given
from jax.sharding import NamedSharding, PartitionSpec
from mesh_cases import MESHES, bits, checkpoint, config_of, drawn, made, mesh_of, needed, plan_of, sharding_of, some_sharding

from shardconv.axes import address
from shardconv.dtypes import dtype_of_code
from shardconv.formats import StoredTensor
from shardconv.formats.reading import Reader
from shardconv.leaf import Leaf, Part
from shardconv.mesh.device import compiled, place, read_as, share
from shardconv.plan import READ_GAP, Plan
from shardconv.run.work import Workspace
from shardconv.values import ValueRule

TILE = 512


@laws(0.05)
@given(worlds())
def test_any_address_lands_on_any_mesh(world: World) -> None:
    with tempfile.TemporaryDirectory() as folder:
        case = drawn(world, Path(folder))
        for leaf, wanted in case.leaves[:1]:
            sharding = some_sharding(world.dice, leaf.shape)
            with Reader(case.root, coalesce_gap=0) as reader:
                array = place(leaf, sharding, case.stored, reader, Workspace(), 16)
            assert array.sharding == sharding and array.dtype == np.int32
            np.testing.assert_array_equal(bits(array).view(np.int32), wanted)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: checkpoint(config_of(family), root / family) for family in ONE_EACH}


def placed(plan: Plan, leaf: Leaf, sharding: NamedSharding) -> tuple[jax.Array, Reader]:
    with Reader(plan.source.root, coalesce_gap=READ_GAP) as reader:
        return place(leaf, sharding, plan.source.tensors, reader, Workspace(), TILE), reader


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unscanned"])
@pytest.mark.parametrize("layout", ["flat", "maxtext"])
@pytest.mark.parametrize("family", ONE_EACH)
def test_every_leaf_bit_for_bit_and_read_once(checkpoints: dict[str, Path], family: str, layout: str, scan: bool, mesh: str) -> None:
    plan = plan_of(checkpoints[family], layout, mesh, scan=scan)
    kinds = {}
    for leaf in plan.leaves:
        kinds.setdefault((leaf.template, leaf.dtype), leaf)
    for leaf in kinds.values():
        array, reader = placed(plan, leaf, sharding_of(leaf, mesh_of(MESHES[mesh][0])))
        assert array.dtype.name == leaf.dtype
        np.testing.assert_array_equal(bits(array), made(leaf, plan.source.tensors, plan.source.root))
        assert reader.counts.bytes_read == needed(leaf), "whatever the mesh"


@pytest.mark.parametrize("dtype", ["float32", "float8_e4m3fn"])
def test_values_are_converted_before_they_leave_the_host(checkpoints: dict[str, Path], dtype: str) -> None:
    plan = plan_of(checkpoints["gemma2"], "maxtext", "both", dtype=dtype)
    for leaf in plan.leaves:
        array, _ = placed(plan, leaf, sharding_of(leaf, mesh_of(MESHES["both"][0])))
        np.testing.assert_array_equal(bits(array), made(leaf, plan.source.tensors, plan.source.root))


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """What XLA compiles, as it happens."""
    seen: list[str] = []

    def listen(event: str, _: float, **facts: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def test_equal_layers_are_compiled_once(tmp_path: Path, compilations: list[str]) -> None:
    source = checkpoint({**config_of("llama"), "num_hidden_layers": 20}, tmp_path / "source")
    plan = plan_of(source, "flat", "both", scan=False)
    mesh = mesh_of(MESHES["both"][0])
    kinds = len({leaf.template for leaf in plan.leaves})
    compiled.cache_clear()
    read_as.cache_clear()
    for leaf in plan.leaves:
        placed(plan, leaf, sharding_of(leaf, mesh))
    assert len(plan.leaves) > 9 * kinds
    # Query and output, key and value, gate and up may be of one kind with others; two norms of a layer are.
    assert 0 < compiled.cache_info().misses < kinds
    assert len(compilations) == compiled.cache_info().misses + len({(leaf.shape, leaf.spec) for leaf in plan.leaves})


def test_a_mesh_of_explicit_axes_is_as_good(checkpoints: dict[str, Path]) -> None:
    plan = plan_of(checkpoints["llama"], "maxtext", "both")
    axes = MESHES["both"][0]
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    for leaf in plan.leaves:
        sharding = sharding_of(leaf, mesh)
        array, _ = placed(plan, leaf, sharding)
        assert array.sharding == sharding and array.sharding.mesh.axis_types == mesh.axis_types
        np.testing.assert_array_equal(bits(array), made(leaf, plan.source.tensors, plan.source.root))


@pytest.mark.parametrize("code", ["F16", "BF16", "F8_E4M3"])
@pytest.mark.parametrize("spec", [(), ("x",)], ids=["copies", "columns"])
def test_no_bit_pattern_is_another_after_padding(tmp_path: Path, code: str, spec: tuple[str, ...]) -> None:
    """XLA for the CPU turns some NaNs of bfloat16 into others where it pads in the same loop in which it takes bits for it."""
    axes = {"a": 1027, "b": 64, "room": 5}
    dtype = dtype_of_code(code)
    raw = np.arange(1027 * 64).astype(f"u{dtype.numpy.itemsize}").reshape(1027, 64)
    (tmp_path / "stored").write_bytes(raw.tobytes())
    part = Part("w", (code,), address("w", "a b", axes), address("w", "b (a | room)", axes), {}, ValueRule())
    leaf = Leaf(("w",), "w", (64, 1032), dtype.name, (64, 1032), (64, 1032), (None, None), (part,), True, 320)
    stored = {"w": StoredTensor("w", "stored", code, (1027, 64), 0, raw.nbytes)}
    with Reader(str(tmp_path), coalesce_gap=0) as reader:
        array = place(leaf, NamedSharding(mesh_of({"x": 2}), PartitionSpec(*spec)), stored, reader, Workspace(), TILE)
    np.testing.assert_array_equal(bits(array), np.pad(raw.T, ((0, 0), (0, 5))))


@pytest.mark.parametrize("code", ["BOOL", "I8", "F8_E4M3", "F8_E8M0", "U16", "F16", "BF16", "I32", "F32"])
def test_every_dtype_keeps_its_bits(tmp_path: Path, code: str) -> None:
    rng = np.random.default_rng(3)
    data = rng.integers(0, 2 if code == "BOOL" else 256, 24 * 16 * dtype_of_code(code).numpy.itemsize, np.uint8)
    (tmp_path / "stored").write_bytes(data.tobytes())
    leaf, stored = leaf_of(code, (24, 16))
    with Reader(str(tmp_path), coalesce_gap=0) as reader:
        array = place(leaf, NamedSharding(mesh_of({"x": 8}), PartitionSpec("x")), stored, reader, Workspace(), TILE)
    wanted = data.view(dtype_of_code(code).numpy).reshape(24, 16).T
    assert array.dtype == wanted.dtype
    np.testing.assert_array_equal(bits(array), wanted.view(f"u{wanted.itemsize}"))


def leaf_of(code: str, shape: tuple[int, int]) -> tuple[Leaf, dict]:
    axes = {"a": shape[0], "b": shape[1]}
    dtype = dtype_of_code(code)
    part = Part("w", (code,), address("w", "a b", axes), address("w", "b a", axes), {}, ValueRule())
    turned = shape[::-1]
    leaf = Leaf(("w",), "w", turned, dtype.name, turned, turned, (None, None), (part,), True, 0)
    return leaf, {"w": StoredTensor("w", "stored", code, shape, 0, dtype.nbytes(shape))}


def test_what_devices_do_not_move_is_refused(tmp_path: Path) -> None:
    leaf, stored = leaf_of("C64", (8, 8))
    (tmp_path / "stored").write_bytes(bytes(512))
    with Reader(str(tmp_path), coalesce_gap=0) as reader, pytest.raises(ValueError, match="devices do not lay out complex64"):
        place(leaf, NamedSharding(mesh_of({"x": 8}), PartitionSpec("x")), stored, reader, Workspace(), TILE)


# --- how rows are spread ----------------------------------------------------------------------------------------------------------

SIZES = {"layers": 4, "experts": 6, "embed": 16, "heads": 8, "head_dim": 4, "mlp": 24}
MESH = {"x": 2, "y": 3, "z": 2}


@pytest.mark.parametrize(
    ("source", "target", "spec", "spread"),
    [
        # The leaf wants rows along x: they are so already. The other axes take what divides: layers by z, not by three.
        (("{layers}.w", "mlp embed"), ("w", "embed layers mlp"), ((), (), ("x",)), (("z",), ("x", "y"))),
        # Columns along x: rows are whole tensors as far as they go.
        (("{layers}.w", "mlp embed"), ("w", "embed layers mlp"), (("x",), (), ()), (("x", "z"), ("y",))),
        # Layers along z, as a pipeline has them.
        (("{layers}.w", "mlp embed"), ("w", "layers embed mlp"), (("z",), (), ()), (("z", "x"), ("y",))),
        # Experts by three and two.
        (("{layers}.{experts}.w", "mlp embed"), ("w", "experts layers embed mlp"), (("y",), (), (), ()), (("x", "z"), ("y",), ())),
        # Nothing is wanted, one tensor: rows.
        (("w", "mlp embed"), ("w", "embed mlp"), ((), ()), (("x", "y", "z"),)),
        (("w", ""), ("w", ""), (), (("x", "y", "z"),)),
    ],
)
def test_rows_are_spread_as_the_leaf_wants_them(source: tuple, target: tuple, spec: tuple, spread: tuple) -> None:
    axes = {axis: size for axis, size in SIZES.items() if axis in " ".join((*source, *target))}
    part = Part("w", ("BF16",), address(*source, axes), address(*target, axes), {}, ValueRule())
    assert share(part, spec, MESH).recipe.spread == spread


@pytest.mark.parametrize("heads", [16, 28])
def test_what_devices_hold_while_they_make_a_leaf(heads: int) -> None:
    """Nothing is gathered whole on the way from rows to columns, also where a device's rows end within a head."""
    axes = {"layers": 6, "heads": heads, "head_dim": 64, "embed": 1024}
    source, target = address("{layers}.q", "(heads head_dim) embed", axes), address("q", "embed layers heads head_dim", axes)
    part = Part("q", ("BF16",), source, target, {}, ValueRule())
    mesh = mesh_of({"fsdp": 4, "tensor": 2})
    one = share(part, (("fsdp",), (), ("tensor",), ()), dict(mesh.shape))
    sharding = NamedSharding(mesh, PartitionSpec("fsdp", None, "tensor"))
    used = compiled((one.recipe,), sharding, 2).memory_analysis()
    shard = 6 * heads * 64 * 1024 * 2 // 8
    assert used.argument_size_in_bytes == used.output_size_in_bytes == used.alias_size_in_bytes == shard
    assert used.temp_size_in_bytes <= 3.1 * shard


# --- where XLA knows no way but to copy an array whole to every device --------------------------------------------------------------

BOTH = {"fsdp": 4, "tensor": 2}
QUERY = (("{layers}.w", "(heads head_dim) embed"), ("w", "embed layers heads head_dim"))
FAR = {
    # Rows lie along tensor too, which the leaf does not use: they are split without it first.
    "embedding": (BOTH, ("w", "vocab embed"), ("w", "vocab embed"), (None, "fsdp"), True),
    "logits": (BOTH, ("w", "vocab embed"), ("w", "embed vocab"), ("fsdp",), True),
    "gate": (BOTH, ("{layers}.w", "mlp embed"), ("w", "embed layers mlp"), ("fsdp",), True),
    "query": (BOTH, *QUERY, ("fsdp",), True),
    # Layers lie along both, and the leaf is split along both elsewhere.
    "query by digits": (BOTH, *QUERY, ("fsdp", None, None, "tensor"), False),
    # A device has the rows of one head and three quarters.
    "query in part": ({"fsdp": 8}, ("{few}.w", "(heads head_dim) embed"), ("w", "embed few heads head_dim"), ("fsdp",), False),
}


@pytest.mark.parametrize("case", FAR)
def test_no_device_holds_a_leaf_whole_in_between(tmp_path: Path, case: str) -> None:
    axes, source, target, spec, by_devices = FAR[case]
    sizes = {"layers": 8, "few": 4, "vocab": 4096, "embed": 1024, "mlp": 512, "heads": 14, "head_dim": 64}
    sizes = {axis: size for axis, size in sizes.items() if axis in " ".join((*source, *target))}
    part = Part("w", ("BF16",), address(*source, sizes), address(*target, sizes), {}, ValueRule())
    shape = part.target.shape
    leaf = Leaf(("w",), "w", shape, "bfloat16", shape, shape, (None,) * len(shape), (part,), True, 0)
    stored = {}
    for seed, (key, _) in enumerate(part.source.keys()):
        (tmp_path / key).write_bytes(np.random.default_rng(seed).bytes(2 * math.prod(part.source.shape)))
        stored[key] = StoredTensor(key, key, "BF16", part.source.shape, 0, 2 * math.prod(part.source.shape))

    sharding = NamedSharding(mesh_of(axes), PartitionSpec(*spec))
    entries = [(name,) if name else () for name in (*spec, *[None] * (len(shape) - len(spec)))]
    made_by = compiled((share(part, entries, axes).recipe,), sharding, 2)
    assert (made_by is not None) == by_devices
    if made_by is not None:
        assert made_by.memory_analysis().temp_size_in_bytes <= 3.5 * 2 * math.prod(sharding.shard_shape(shape))

    with Reader(str(tmp_path), coalesce_gap=0) as reader:
        array = place(leaf, sharding, stored, reader, Workspace(), 1 << 20)
        assert reader.counts.bytes_read == 2 * math.prod(shape)
    assert array.sharding == sharding
    np.testing.assert_array_equal(bits(array), made(leaf, stored, str(tmp_path)))
