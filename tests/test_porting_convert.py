"""A PyTorch model onto a user's own model: the object comes back, it computes the same, and mistakes are one report."""

import copy
import gc
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("flax")
pytest.importorskip("equinox")

import equinox as eqx  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import orbax.checkpoint as ocp  # noqa: E402
from flax import linen, nnx  # noqa: E402
from flax.core import FrozenDict  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402
from porting_models import IMAGE, KEY, EqxNet, LinenNet, NnxNet, torch_net  # noqa: E402

import shardconv  # noqa: E402
from shardconv.errors import ConfigError, InputError, ShardconvError  # noqa: E402

nn = torch.nn
Array = np.ndarray[Any, Any]
X = np.random.default_rng(0).standard_normal((2, *IMAGE)).astype(np.float32)
LAST = np.moveaxis(X, 1, -1)
SAME = {"": ""}
PLAIN = {**SAME, "fc.kernel": "fc.weight: o i -> i o"}
FOLDED = {**SAME, "fc.kernel": "fc.weight: o (c h w) -> (h w c) o; h=5, w=4"}
CLOSE = 2e-6  # 80 products of about one, summed in float32 in another order; a fault comes to 0.1


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with jax.default_matmul_precision("highest"), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def net() -> Any:
    return torch_net()


def expected(net: Any) -> Array:
    with torch.inference_mode():
        return np.asarray(net(torch.from_numpy(X)).numpy())


def linen_variables(turned: bool = False) -> Any:
    return jax.eval_shape(LinenNet(turned).init, KEY, jnp.asarray(LAST))


def ran(model: Any) -> Array:
    if isinstance(model, nnx.Module):
        return np.asarray(model(jnp.asarray(LAST)))
    module, state = model
    return np.asarray(jax.vmap(lambda x: module(x, state), axis_name="batch")(jnp.asarray(X)))


# What comes back


@pytest.mark.parametrize("turned", [False, True])
def test_linen_variables(net: Any, turned: bool) -> None:
    found = shardconv.convert_module(net, linen_variables(turned), PLAIN if turned else FOLDED)
    assert set(found) == {"params", "batch_stats"}
    y = np.asarray(LinenNet(turned).apply(found, jnp.asarray(LAST)))
    assert abs(y - expected(net)).max() < CLOSE
    wrong = shardconv.convert_module(net, linen_variables(turned), FOLDED if turned else PLAIN)
    assert abs(np.asarray(LinenNet(turned).apply(wrong, jnp.asarray(LAST))) - expected(net)).max() > 0.1


def test_a_mapping_that_says_nothing_of_what_is_flattened_is_warned_of(net: Any) -> None:
    said = (
        'fc.kernel: if this takes 4 flattened channels, and the model has channels last, the line is "fc.kernel" = '
        '"fc.weight: o (c h w) -> (h w c) o; c=4, h=.."; if not, say "fc.kernel" = "fc.weight: o i -> i o"'
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(said)}$"):
        shardconv.convert_module(net, linen_variables(True), SAME)


def test_linen_variables_may_be_frozen(net: Any) -> None:
    found = shardconv.convert_module(net, FrozenDict(linen_variables(True)), PLAIN)
    assert isinstance(found, FrozenDict)
    assert np.array_equal(found["batch_stats"]["bn1"]["mean"], net.bn1.running_mean.numpy())


@pytest.mark.parametrize("abstract", [False, True])
def test_an_nnx_module_is_updated_in_place(net: Any, abstract: bool) -> None:
    model = nnx.eval_shape(lambda: NnxNet(nnx.Rngs(0))) if abstract else NnxNet(nnx.Rngs(0))
    found = shardconv.convert_module(net, model, FOLDED)
    assert found is model
    assert abs(ran(found) - expected(net)).max() < CLOSE
    assert not abstract or isinstance(found.drop.rngs.count.get_value(), jax.ShapeDtypeStruct)  # no parameter: left alone


def test_another_epsilon_is_warned_of(net: Any) -> None:
    model = nnx.eval_shape(lambda: NnxNet(nnx.Rngs(0)))
    model.bn1.epsilon = 1e-6
    said = "the same weights compute something else: bn1 has epsilon 1e-06, bn1 has 1e-05"
    with pytest.warns(UserWarning, match=f"^{said}$"):
        shardconv.convert_module(net, model, FOLDED)
    flattened = "^fc.kernel: if this takes 4 flattened channels, and the model has channels last, the line is "
    with pytest.warns(UserWarning, match=f"^{said}$"), pytest.warns(UserWarning, match=flattened):
        shardconv.convert_module(net, model)
    shardconv.convert_module(net.state_dict(), model, FOLDED)  # says nothing of it


def test_an_nnx_state(net: Any) -> None:
    model = NnxNet(nnx.Rngs(0))
    found = shardconv.convert_module(net, nnx.state(model), FOLDED)
    assert isinstance(found, nnx.State)
    assert abs(ran(model) - expected(net)).max() > 0.1
    nnx.update(model, found)
    assert abs(ran(model) - expected(net)).max() < CLOSE


def test_an_equinox_module_and_its_state(net: Any) -> None:
    model = eqx.filter_eval_shape(eqx.nn.make_with_state(EqxNet), KEY)
    found = shardconv.convert_module(net, model, SAME)
    assert isinstance(found[0], EqxNet) and isinstance(found[1], eqx.nn.State)
    assert found[0].act is jax.nn.relu
    assert abs(ran(found) - expected(net)).max() < CLOSE


def test_an_equinox_module_that_still_has_its_state(net: Any) -> None:
    found = shardconv.convert_module(net, EqxNet(KEY), SAME)
    state = eqx.nn.State(found)
    assert abs(ran((found, state)) - expected(net)).max() < CLOSE


def test_a_plain_tree() -> None:
    tree = {"w": [np.zeros((3, 4), np.float32), np.zeros((), np.int32)], "note": "kept"}
    stored = np.arange(12, dtype=np.float32).reshape(4, 3)
    found = shardconv.convert_module({"a": stored, "n": np.int64(7)}, tree, {"w.0": "a: o i -> i o", "w.1": "n"})
    assert found["note"] == "kept" and int(found["w"][1]) == 7
    assert np.array_equal(found["w"][0], stored.T)


def test_shardings_and_dtypes_are_the_models() -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    sharding = NamedSharding(mesh, PartitionSpec("a", "b"))
    weight = torch.randn(6, 8)
    tree = {"params": {"fc": {"kernel": jax.ShapeDtypeStruct((8, 6), jnp.bfloat16, sharding=sharding)}}}
    found = shardconv.convert_module({"fc.weight": weight}, tree, SAME)["params"]["fc"]["kernel"]
    assert found.sharding == sharding and found.dtype == jnp.bfloat16
    assert np.array_equal(np.asarray(found, np.float32), weight.T.bfloat16().float().numpy())


def test_bits_of_bfloat16_are_kept() -> None:
    bits = np.array([[0x7FC1, 0xFF80], [0x8000, 0x0001]], np.uint16)
    weight = torch.from_numpy(bits.copy()).view(torch.bfloat16)
    tree = {"fc": {"weight": jax.ShapeDtypeStruct((2, 2), jnp.bfloat16)}}
    found = shardconv.convert_module({"fc.weight": weight}, tree, {"fc.weight": "fc.weight: o i -> i o"})
    assert np.array_equal(np.asarray(found["fc"]["weight"]).view(np.uint16), bits.T)


def test_tied_weights_are_one_array_or_two() -> None:
    module = nn.Sequential()
    module.add_module("emb", nn.Embedding(5, 3))
    module.add_module("head", nn.Linear(3, 5, bias=False))
    module.head.weight = module.emb.weight
    one = {"params": {"emb": {"embedding": np.zeros((5, 3), np.float32)}}}
    two = {"params": {**one["params"], "head": {"kernel": np.zeros((3, 5), np.float32)}}}
    weight = module.emb.weight.detach().numpy()
    assert np.array_equal(shardconv.convert_module(module, one, SAME)["params"]["emb"]["embedding"], weight)
    assert np.array_equal(shardconv.convert_module(module, two, SAME)["params"]["head"]["kernel"], weight.T)


def test_a_variable_that_nnx_shares_is_one_array() -> None:
    class Tied(nnx.Module):
        def __init__(self) -> None:
            self.emb = nnx.Embed(5, 3, rngs=nnx.Rngs(0))
            self.again = self.emb

    module = nn.Sequential()
    module.add_module("emb", nn.Embedding(5, 3))
    module.add_module("again", module.emb)
    model = shardconv.convert_module(module, nnx.eval_shape(Tied), SAME)
    assert model.again is model.emb
    assert np.array_equal(model.emb.embedding[...], module.emb.weight.detach().numpy())


def test_boxes_of_logical_axes_stay_around_their_arrays() -> None:
    init = linen.with_partitioning(linen.initializers.ones, ("embed", "mlp"))
    variables = jax.eval_shape(linen.Dense(4, kernel_init=init).init, KEY, jnp.ones((1, 3)))
    layer = nn.Linear(3, 4)
    found = shardconv.convert_module(layer, variables, SAME)["params"]
    assert isinstance(found["kernel"], linen.Partitioned) and found["kernel"].names == ("embed", "mlp")
    assert np.array_equal(found["kernel"].value, layer.weight.detach().numpy().T)


def test_arrays_of_one_name_are_refused() -> None:
    tree = {"params": {"a": {"w": np.zeros(1)}}, "batch_stats": {"a": {"w": np.zeros(1)}}}
    assert refusal({}, tree, SAME) == "the model's arrays have no names of their own (1 problem):\n  two arrays of the model are called a.w"


def test_files_are_a_source_too(net: Any, tmp_path: Path) -> None:
    """Of safetensors and of torch.save; tied tensors are stored once."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    state = net.state_dict()
    save_file(state, tmp_path / "model.safetensors")
    torch.save({**state, "again.weight": state["fc.weight"]}, tmp_path / "model.pth")
    for name in ("model.safetensors", "model.pth"):
        found = shardconv.convert_module(str(tmp_path / name), linen_variables(), FOLDED)
        expected = shardconv.convert_module(net, linen_variables(), FOLDED)
        assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))


def test_saved_with_orbax_and_loaded_again(net: Any, tmp_path: Path) -> None:
    found = shardconv.convert_module(net, NnxNet(nnx.Rngs(0)), FOLDED)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "net", nnx.to_pure_dict(nnx.state(found, (nnx.Param, nnx.BatchStat))))
        checkpointer.wait_until_finished()
        other = NnxNet(nnx.Rngs(1))
        state = nnx.state(other, (nnx.Param, nnx.BatchStat))
        nnx.replace_by_pure_dict(state, checkpointer.restore(tmp_path / "net", nnx.to_pure_dict(state)))
    nnx.update(other, state)
    assert np.array_equal(ran(other), ran(found))
    gc.collect()


# Recurrence


class Both(linen.Module):
    """Two layers of LSTM, each both ways."""

    @linen.compact
    def __call__(self, x: Any) -> Any:
        for layer in range(2):
            cells = [linen.OptimizedLSTMCell(4, name=f"{way}{layer}") for way in ("forward", "backward")]
            x = linen.Bidirectional(*map(linen.RNN, cells))(x)
        return x


def test_a_cell_is_one_direction_of_one_layer() -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True)
    x = torch.randn(2, 5, 3)
    variables = jax.eval_shape(Both().init, KEY, jnp.asarray(x.numpy()))
    mapping = {"forward{i}": "l{i}", "backward{i}": "l{i}_reverse"}
    run = jax.jit(Both().apply, compiler_options={"xla_backend_optimization_level": 0})
    expected = lstm(x)[0].detach().numpy()
    assert abs(np.asarray(run(shardconv.convert_module(lstm, variables, mapping), jnp.asarray(x.numpy()))) - expected).max() < CLOSE
    crossed = {**mapping, "forward1": "l1_reverse", "backward1": "l1"}
    assert abs(np.asarray(run(shardconv.convert_module(lstm, variables, crossed), jnp.asarray(x.numpy()))) - expected).max() > 0.01


# Layers in a scan, and holes


class Block(linen.Module):
    @linen.compact
    def __call__(self, x: Any, _: None) -> tuple[Any, None]:
        return x + linen.Dense(4, name="fc")(linen.LayerNorm(epsilon=1e-5, name="norm")(x)), None


class Scanned(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        layers = linen.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return layers(name="blocks")(x, None)[0]


def test_stacked_layers_are_addresses_too() -> None:
    torch.manual_seed(0)
    blocks = nn.ModuleList([nn.ModuleDict({"norm": nn.LayerNorm(4), "fc": nn.Linear(4, 4)}) for _ in range(3)])
    x = torch.randn(2, 4)
    y = x
    for block in blocks:
        y = y + block["fc"](block["norm"](y))
    variables = jax.eval_shape(Scanned().init, KEY, jnp.asarray(x.numpy()))
    spelt = {
        "blocks.fc.kernel": "{layers}.fc.weight: o i -> layers i o",
        "blocks.fc.bias": "{layers}.fc.bias: o -> layers o",
        "blocks.norm.scale": "{layers}.norm.weight: o -> layers o",
        "blocks.norm.bias": "{layers}.norm.bias: o -> layers o",
    }
    by_rule = {"blocks": "{layers}"}
    for mapping in (spelt, by_rule):
        found = np.asarray(Scanned().apply(shardconv.convert_module(blocks, variables, mapping), jnp.asarray(x.numpy())))
        assert abs(found - y.detach().numpy()).max() < CLOSE
    state = {**blocks.state_dict(), "3.fc.weight": torch.zeros(4, 4), "3.fc.bias": torch.zeros(4)}
    assert refusal(state, variables, by_rule) == (
        "the checkpoint does not fit the model (1 problem):\n"
        "  {layers}.fc, of which there are 4 (weight (4, 4), bias (4)) does not fit blocks.fc (bias (3, 4), kernel (3, 4, 4))\n"
        "      make the model's layer like it, or map its arrays one by one"
    )


def test_holes_stand_for_numbers_of_modules(tmp_path: Path) -> None:
    state = {f"layer.{i}.{name}.weight": np.full((4, 3), i, np.float32) for i in range(2) for name in ("up", "down")}
    tree = {"params": {f"block_{i}": {name: {"kernel": np.zeros((3, 4), np.float32)} for name in ("up", "d")} for i in range(2)}}
    path = tmp_path / "port.toml"
    pairs = '"block_{n}" = "layer.{n}"\n"block_{n}.d.kernel" = "layer.{n}.down.weight: o i -> i o"\n'
    path.write_text(f'ignore = ["*.inv_freq"]\n[mapping]\n{pairs}')
    found = shardconv.convert_module({**state, "rope.inv_freq": np.ones(2)}, tree, path)["params"]
    assert all(float(found[f"block_{i}"][name]["kernel"].mean()) == i for i in range(2) for name in ("up", "d"))


# What is said of mistakes


def refusal(source: Any, model: Any, mapping: Any) -> str:
    with pytest.raises(ShardconvError) as caught:
        shardconv.convert_module(source, model, mapping)
    return str(caught.value)


def test_everything_that_is_wrong_is_one_report(net: Any) -> None:
    model = NnxNet(nnx.Rngs(0))
    zeros = nnx.initializers.zeros
    model.conv1 = nnx.Conv(3, 8, (2, 2), kernel_init=zeros, rngs=nnx.Rngs(0))
    model.extra = nnx.Linear(2, 2, use_bias=False, kernel_init=zeros, rngs=nnx.Rngs(0))
    before = copy.deepcopy(nnx.to_pure_dict(nnx.state(model)))
    state = {**net.state_dict(), "other.weight": torch.ones(3), "fc.scale": torch.ones(2)}
    assert refusal(state, model, {**SAME, "fc.bias": "fc.biass"}) == (
        "the checkpoint does not fit the model (5 problems):\n"
        "  fc.bias = fc.biass: fc.biass is not in the checkpoint\n"
        "  conv1 (weight (4, 3, 2, 2), bias (4)) does not fit conv1 (bias (8), kernel (2, 2, 3, 8))\n"
        "      make the model's layer like it, or map its arrays one by one\n"
        "  fc (weight (2, 80), bias (2), scale (2)) does not fit fc (bias (2), kernel (80, 2))\n"
        "      make the model's layer like it, or map its arrays one by one\n"
        "  other (weight (3)) does not fit other (which has no arrays)\n"
        "      make the model's layer like it, or map its arrays one by one\n"
        "  extra.kernel (2, 2): nothing fills it\n"
        "      map it, or make the model without it"
    )
    after = nnx.to_pure_dict(nnx.state(model))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before["fc"]), jax.tree.leaves(after["fc"]), strict=True))


def test_what_goes_nowhere_is_said() -> None:
    state = {"a.weight": np.ones((4, 3), np.float32), "b.weight": np.ones(3, np.float32), "qkv": np.ones(6, np.float32)}
    tree = {"params": {"a": {"kernel": np.zeros((3, 4), np.float32)}, "q": np.zeros(2, np.float32)}}
    assert refusal(state, tree, {"a": "a", "q": "qkv: (d | d | d) -> d"}) == (
        "the checkpoint does not fit the model (2 problems):\n"
        "  b.weight (3) goes nowhere\n"
        '      map it, or ignore = ["b.weight"]\n'
        "  qkv: 4 of its 6 elements go nowhere\n"
        "      map all its parts"
    )
    assert shardconv.convert_module(state, tree, {"a": "a", "q": "qkv: (d | 4) -> d"}, ignore=["b.*", "qkv"])


def test_a_gru_that_nnx_cannot_represent_is_refused() -> None:
    class Model(nnx.Module):
        def __init__(self) -> None:
            self.cell = nnx.GRUCell(5, 4, rngs=nnx.Rngs(0))

    gru = nn.GRU(5, 4)
    assert refusal(gru, nnx.eval_shape(Model), {"cell": "l0"}) == (
        "the checkpoint does not fit the model (1 problem):\n"
        "  bias_hh_l0: its last 4 numbers have no place: nnx.GRUCell has no bias on what the reset gate multiplies; "
        "use linen.GRUCell or equinox.nn.GRUCell, or write the cell with one"
    )
    with torch.no_grad():
        gru.bias_hh_l0[8:] = 0.0
    assert shardconv.convert_module(gru, nnx.eval_shape(Model), {"cell": "l0"})


def test_slopes_that_flax_cannot_represent_are_refused() -> None:
    assert refusal(nn.PReLU(3), nnx.PReLU(), SAME) == (
        "the checkpoint does not fit the model (1 problem):\n"
        "  the model (PReLU: weight (3)) does not fit the model (negative_slope ())\n"
        "      Flax NNX: its PReLU has one slope for all channels"
    )


def test_a_layer_that_fits_in_two_ways_must_be_named() -> None:
    up = nn.Sequential()
    up.add_module("up", nn.ConvTranspose2d(4, 4, 3))
    variables = jax.eval_shape(linen.ConvTranspose(4, (3, 3)).init, KEY, jnp.ones((1, 5, 5, 4)))
    tree = {"params": {"up": variables["params"]}}
    assert refusal(up, tree, SAME) == (
        "the checkpoint does not fit the model (1 problem):\n"
        "  up (ConvTranspose2d: weight (4, 4, 3, 3), bias (4)) fits up as ConvTranspose2d, transpose_kernel=True, "
        "or as ConvTranspose2d, transpose_kernel=False\n"
        '      say which: "up" = "up: ConvTranspose2d, transpose_kernel=True"'
    )
    found = shardconv.convert_module(up, tree, {"up": "up: ConvTranspose2d, transpose_kernel=False"})
    expected = up.up.weight.detach().numpy()[:, :, ::-1, ::-1].transpose(2, 3, 0, 1)
    assert np.array_equal(found["params"]["up"]["kernel"], expected)


def test_nnx_and_equinox_say_themselves_what_their_layers_are() -> None:
    up = nn.ConvTranspose2d(4, 4, 3)
    for turned in (True, False):
        model = nnx.eval_shape(lambda turned=turned: nnx.ConvTranspose(4, 4, (3, 3), transpose_kernel=turned, rngs=nnx.Rngs(0)))
        weight = up.weight.detach().numpy()
        expected = weight.transpose(2, 3, 1, 0) if turned else weight[:, :, ::-1, ::-1].transpose(2, 3, 0, 1)
        assert np.array_equal(shardconv.convert_module(up.state_dict(), model, SAME).kernel[...], expected)
    there = shardconv.convert_module(up.state_dict(), eqx.filter_eval_shape(eqx.nn.ConvTranspose2d, 4, 4, 3, key=KEY), SAME)
    assert np.array_equal(there.weight, weight[:, :, ::-1, ::-1].swapaxes(0, 1))


@pytest.mark.parametrize(
    ("mapping", "said"),
    [
        (3, '  this is a int\n      give a dict such as {"fc": "head"}, or the path of a TOML file'),
        ({"fc.kernel": "fc.weight: o i"}, "  fc.kernel = \"fc.weight: o i\": 'fc.weight: o i' has no `dims -> dims` after the colon"),
        (
            {"fc.kernl": "fc.weight: o i -> i o"},
            '  fc.kernl = "fc.weight: o i -> i o": the model has no such array; for a module, write the checkpoint\'s module',
        ),
    ],
)
def test_a_mapping_that_cannot_be_read(mapping: Any, said: str) -> None:
    assert refusal({}, linen_variables(), mapping) == f"the mapping cannot be read (1 problem):\n{said}"


def test_sources_that_are_none() -> None:
    assert refusal(3, {}, {}) == (
        "convert_module takes a torch.nn.Module, a state dict or a path (1 problem):\n  this is int\n      give one of these"
    )
    assert refusal("no/such/model.safetensors", {}, {}).startswith(f"{Path.cwd()}/no/such/model.safetensors cannot be read as a checkpoint")
    assert refusal(nn.Linear(2, 3, device="meta"), {}, {}) == (
        "the module has no weights (3 problems):\n  weight is on the meta device\n  bias is on the meta device\n"
        "  2 in all\n      load the checkpoint into it first"
    )
    assert issubclass(InputError, ShardconvError) and issubclass(ConfigError, ShardconvError)


def test_a_mapping_that_is_not_there() -> None:
    assert refusal({}, linen_variables(), "no/such/mapping.toml") == (
        "cannot read the mapping (1 problem):\n  no/such/mapping.toml: no such file\n"
        "      `shardconv init DIR --layout module:make_model` and shardconv.propose_mapping write one"
    )


def test_layers_that_are_alike_are_told_of_once() -> None:
    state = {f"layer.{n}.scale": np.ones(8, np.float32) for n in range(12)}
    assert refusal(state, {"gain": np.ones(8, np.float32)}, {"gain": "0"}) == (
        "the checkpoint does not fit the model (1 problem):\n"
        "  layer.0.scale (8) goes nowhere (and 11 more like it)\n"
        '      map it, or ignore = ["layer.{}.scale"]'
    )
    assert shardconv.convert_module(state, {"gain": np.zeros(8, np.float32)}, {"gain": "0"}, ignore=["layer.{}.scale"])["gain"].sum() == 0


@pytest.mark.parametrize(
    ("model", "fact", "remedy"),
    [
        (LinenNet(False), "a LinenNet", "give its variables: jax.eval_shape(model.init, jax.random.key(0), inputs)"),
        (LinenNet, "the class LinenNet", "give its variables: jax.eval_shape(model.init, jax.random.key(0), inputs)"),
        (NnxNet, "the class NnxNet", "make one: nnx.eval_shape(lambda: NnxNet(nnx.Rngs(0)))"),
        (EqxNet, "the class EqxNet", "make one: eqx.filter_eval_shape(EqxNet, jax.random.key(0))"),
        (nn.Linear(3, 4), "a Linear", "PyTorch's model is the first argument, and the JAX model the second"),
        (nn.Linear(3, 4).state_dict(), "a OrderedDict", "PyTorch's model is the first argument, and the JAX model the second"),
        (eqx.nn.Identity(), "a Identity", "give Linen's variables, an NNX or Equinox module, or a tree of arrays"),
        ({}, "a dict", "give Linen's variables, an NNX or Equinox module, or a tree of arrays"),
    ],
)
def test_a_model_without_arrays_is_refused(model: Any, fact: str, remedy: str) -> None:
    variables = {"params": {"kernel": np.zeros((3, 4), np.float32)}}
    expected = f"the model has no arrays (1 problem):\n  this is {fact}\n      {remedy}"
    for mapping in (None, SAME):
        assert refusal(variables, model, mapping) == expected
    with pytest.raises(ConfigError, match="the model has no arrays"):
        shardconv.propose_mapping(variables, model)


def test_numbers_that_become_infinite_are_told_of() -> None:
    """Once each: a tensor that fills two arrays, one of them half, and one that was infinite before."""
    qkv = np.float32([[1e6, 1.0], [2.0, -1e5], [7e4, 3.0], [np.inf, np.nan]])
    tree = {"a": jax.ShapeDtypeStruct((2, 2), jnp.float16), "b": jax.ShapeDtypeStruct((2, 4), jnp.float16), "c": np.zeros((4, 2))}
    mapping = {"a": "qkv: (o | o) i -> i o", "b": "qkv: o i -> i o", "c": "qkv"}
    said = (
        "a: 2 of its 4 numbers are too large for float16 and became infinite; "
        "b: 3 of its 8 numbers are too large for float16 and became infinite"
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(said)}$"):
        found = shardconv.convert_module({"qkv": qkv}, tree, mapping)
    assert np.isinf(np.asarray(found["a"])).sum() == 2 and np.isinf(np.asarray(found["b"])).sum() == 4
    many = {f"l{n}": jax.ShapeDtypeStruct((1,), jnp.float16) for n in range(7)}
    with pytest.warns(UserWarning, match="; l4: 1 of its 1 numbers are too large for float16 and became infinite; and so in 2 more"):
        shardconv.convert_module({name: np.float32([1e6]) for name in many}, many, {name: name for name in many})


def test_whole_numbers_that_an_array_cannot_hold_are_refused() -> None:
    said = "the checkpoint does not fit the model (1 problem):\n  steps = count: float32 does not fit int32"
    assert refusal({"count": np.float32([0.5])}, {"steps": np.zeros(1, np.int32)}, {"steps": "count"}) == said


def test_an_abstract_modules_random_numbers_are_given_keys_by_reseed() -> None:
    class Dropping(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.fc = nnx.Linear(4, 4, rngs=rngs)
            self.drop, self.other = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs, rng_collection="noise")

        def __call__(self, x: Any) -> Any:
            return self.other(self.drop(self.fc(x)))

    layer, x = nn.Sequential(), jnp.ones((8, 4))
    layer.add_module("fc", nn.Linear(4, 4))
    for streams in ({"default": 0}, {"params": 0, "dropout": 1, "noise": 2}):
        model = shardconv.convert_module(layer, nnx.eval_shape(lambda streams=streams: Dropping(nnx.Rngs(**streams))), SAME)
        model.train()
        with pytest.raises(TypeError, match="ShapeDtypeStruct"):
            model(x)
        nnx.reseed(model, **streams)
        dropped = np.asarray(model(x))
        assert 0 < (dropped == 0).sum() < dropped.size
        model.eval()
        assert abs(np.asarray(model(x)) - layer(torch.ones(8, 4)).detach().numpy()).max() < CLOSE
