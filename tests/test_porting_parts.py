"""Parts of PyTorch's models as they are met: in modules that have several, in wrappers, and where a library has nothing like them."""

import gc
import warnings
from collections.abc import Callable, Iterator, Mapping
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
from flax import linen, nnx  # noqa: E402
from porting_targets import KEY, rngs, shaken  # noqa: E402

import shardconv  # noqa: E402
from shardconv.errors import InputError, ShardconvError  # noqa: E402

nn = torch.nn
weight_norm = torch.nn.utils.parametrizations.weight_norm
Array = np.ndarray[Any, Any]
SAME = {"": ""}
CLOSE = 2e-6  # some dozen products of about one, summed in float32 in another order


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with jax.default_matmul_precision("highest"), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def of_torch(module: Any, *inputs: Array) -> Array:
    with torch.inference_mode():
        return np.asarray(module(*map(torch.from_numpy, inputs)).numpy())


def refusal(source: Any, model: Any, mapping: Any) -> str:
    with pytest.raises(InputError) as caught:
        shardconv.convert_module(source, model, mapping)
    return str(caught.value)


# Weight norm that stays one

X = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)


def normed() -> Any:
    torch.manual_seed(0)
    found = nn.Sequential()
    found.add_module("up", weight_norm(nn.Linear(3, 4)))
    found.add_module("down", weight_norm(nn.Linear(4, 3)))
    found.add_module("out", nn.Linear(3, 2))
    return shaken(found)


class LinenNormed(linen.Module):
    """One layer that is beside its WeightNorm, one that is inside it, and one without."""

    def setup(self) -> None:
        self.up = linen.Dense(4)
        self.norm = linen.WeightNorm(self.up)
        self.down = linen.WeightNorm(linen.Dense(3))
        self.out = linen.Dense(2)

    def __call__(self, x: Any) -> Any:
        return self.out(self.down(self.norm(x)))


class NnxNormed(nnx.Module):
    def __init__(self) -> None:
        self.up = nnx.WeightNorm(nnx.Linear(3, 4, rngs=rngs()), rngs=rngs())
        self.down = nnx.WeightNorm(nnx.Linear(4, 3, rngs=rngs()), rngs=rngs())
        self.out = nnx.Linear(3, 2, rngs=rngs())

    def __call__(self, x: Any) -> Any:
        return self.out(self.down(self.up(x)))


@pytest.mark.parametrize("known", [True, False])
def test_weight_norm_of_linen_takes_both_arrays(known: bool) -> None:
    module = normed()
    source = module if known else module.state_dict()
    shapes = jax.eval_shape(LinenNormed().init, KEY, X)
    found = shardconv.convert_module(source, shapes, SAME)
    assert abs(np.asarray(LinenNormed().apply(found, X)) - of_torch(module, X)).max() < CLOSE
    length, direction = module.up.parametrizations.weight.original0, module.up.parametrizations.weight.original1
    assert np.array_equal(found["params"]["norm"]["up/kernel/scale"], length.detach().numpy()[:, 0])
    assert np.array_equal(found["params"]["up"]["kernel"], direction.detach().numpy().T)
    assert jax.tree.all(jax.tree.map(np.array_equal, shardconv.convert_module(source, shapes), found))  # the names say it all


@pytest.mark.parametrize("abstract", [True, False])
def test_weight_norm_of_nnx_takes_both_arrays(abstract: bool) -> None:
    module = normed()
    expected = of_torch(module, X)
    for source, mapping in ((module, SAME), (module.state_dict(), SAME), (module, None)):
        model = nnx.eval_shape(NnxNormed) if abstract else NnxNormed()
        found = shardconv.convert_module(source, model, mapping)
        assert found is model
        assert np.array_equal(found.up.layer_instance.kernel[...], module.up.parametrizations.weight.original1.detach().numpy().T)
        assert abs(np.asarray(found(jnp.asarray(X))) - expected).max() < CLOSE


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_scales_are_saved_and_loaded_again(library: str, tmp_path: Path) -> None:
    """The keys of both are paths: of Linen with slashes, of NNX tuples."""
    empty = nnx.eval_shape(NnxNormed) if library == "nnx" else jax.eval_shape(LinenNormed().init, KEY, X)
    model = shardconv.convert_module(normed(), empty, SAME)
    shardconv.save_module(tmp_path / "net", model)
    found = shardconv.load_module(tmp_path / "net", nnx.eval_shape(NnxNormed) if library == "nnx" else empty)
    both = [jax.tree.leaves(nnx.state(one) if library == "nnx" else one) for one in (model, found)]
    assert len(both[0]) == 8 and all(np.array_equal(a, b) for a, b in zip(*both, strict=True))
    gc.collect()  # Orbax's loops, before the test's end


def test_a_plain_layer_is_no_weight_normed_one() -> None:
    shapes = jax.eval_shape(linen.WeightNorm(linen.Dense(4)).init, KEY, X)
    assert refusal(nn.Linear(3, 4), shapes, {"layer_instance": ""}) == (
        "the checkpoint does not fit the model (1 problem):\n"
        "  the model (Linear: weight (4, 3), bias (4)) does not fit layer_instance (bias (4), kernel (3, 4), kernel/scale (4))\n"
        "      make the model's layer like it, or map its arrays one by one"
    )


def test_flax_adds_an_epsilon_to_weight_norm_that_short_rows_show() -> None:
    """`conventions` says from which length on: the error is 5e-13 of the square of it."""
    layer = weight_norm(nn.Linear(3, 1, bias=False))
    variables = jax.eval_shape(linen.WeightNorm(linen.Dense(1, use_bias=False)).init, KEY, X)
    for length, seen in ((3e-3, 0.0), (1e-4, 5e-5)):
        with torch.no_grad():
            layer.parametrizations.weight.original1.copy_(torch.tensor([[0.48, 0.6, 0.64]]) * length)
        found = np.asarray(linen.WeightNorm(linen.Dense(1, use_bias=False)).apply(shardconv.convert_module(layer, variables, SAME), X))
        expected = of_torch(layer, X)
        assert abs(abs(found / expected - 1) - seen).max() < 1e-6


# Composed layers


class Encoder(linen.Module):
    """torch's TransformerEncoderLayer, by its names."""

    @linen.compact
    def __call__(self, x: Any) -> Any:
        x = linen.LayerNorm(epsilon=1e-5, name="norm1")(x + linen.MultiHeadDotProductAttention(3, name="self_attn")(x))
        y = linen.Dense(12, name="linear2")(linen.relu(linen.Dense(24, name="linear1")(x)))
        return linen.LayerNorm(epsilon=1e-5, name="norm2")(x + y)


def test_a_transformer_layer_is_its_parts() -> None:
    torch.manual_seed(0)
    module = shaken(nn.TransformerEncoderLayer(12, 3, 24, batch_first=True))
    x = np.random.default_rng(0).random((2, 5, 12)).astype(np.float32)
    shapes, expected = jax.eval_shape(Encoder().init, KEY, x), of_torch(module, x)
    run = jax.jit(Encoder().apply, compiler_options={"xla_backend_optimization_level": 0})
    found = np.asarray(run(shardconv.convert_module(module, shapes, SAME), x))
    crossed = np.asarray(run(shardconv.convert_module(module, shapes, {**SAME, "norm1": "norm2", "norm2": "norm1"}), x))
    noise = abs(expected - of_torch(module.double(), x.astype(np.float64))).max()
    assert abs(found - expected).max() < 4 * noise
    assert abs(crossed - expected).max() > 400 * noise


def test_patches_times_a_matrix_are_a_convolution() -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(3, 8, 4, 4), np.random.default_rng(0).standard_normal((2, 3, 8, 12)).astype(np.float32)
    patches = x.reshape(2, 3, 2, 4, 3, 4).transpose(0, 2, 4, 3, 5, 1).reshape(2, 2, 3, 48)
    variables = jax.eval_shape(linen.Dense(8).init, KEY, patches)
    mapping = {**SAME, "kernel": "weight: o c h w -> (h w c) o"}
    found = np.asarray(linen.Dense(8).apply(shardconv.convert_module(conv, variables, mapping), patches))
    assert abs(found.transpose(0, 3, 1, 2) - of_torch(conv, x)).max() < CLOSE


@pytest.mark.parametrize("library", ["linen", "nnx", "equinox"])
def test_the_linear_layer_of_gpt2_has_its_weight_the_other_way_round(library: str) -> None:
    """The matrix is square, so that no shape says it."""
    torch.manual_seed(0)
    layer = shaken(pytest.importorskip("transformers.pytorch_utils").Conv1D(3, 3))
    if library == "linen":
        variables = shardconv.convert_module(layer, jax.eval_shape(linen.Dense(3).init, KEY, X), SAME)
        found = linen.Dense(3).apply(variables, X)
    elif library == "nnx":
        found = shardconv.convert_module(layer, nnx.eval_shape(lambda: nnx.Linear(3, 3, rngs=rngs())), SAME)(X)
    else:
        found = jax.vmap(shardconv.convert_module(layer, eqx.filter_eval_shape(eqx.nn.Linear, 3, 3, key=KEY), SAME))(X)
    assert abs(np.asarray(found) - of_torch(layer, X)).max() < CLOSE


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
def test_a_cell_of_torch_is_a_cell(kind: Any) -> None:
    torch.manual_seed(0)
    module, state = shaken(kind(3, 4)), np.random.default_rng(1).random((2, 4)).astype(np.float32)
    there, here = (eqx.nn.LSTMCell, (state, state)) if kind is nn.LSTMCell else (eqx.nn.GRUCell, state)
    cell = shardconv.convert_module(module, eqx.filter_eval_shape(there, 3, 4, key=KEY), SAME)
    found = jax.vmap(cell)(X, here)
    expected = module(torch.from_numpy(X), jax.tree.map(torch.from_numpy, here))
    for a, b in zip(jax.tree.leaves(found), expected if isinstance(expected, tuple) else [expected], strict=True):
        assert abs(np.asarray(a) - b.detach().numpy()).max() < CLOSE


class Tied(eqx.Module):
    """An embedding that is used again, as the last layer."""

    shared: Any

    def __init__(self) -> None:
        parts = (eqx.nn.Embedding(5, 3, key=KEY), eqx.nn.Linear(3, 5, use_bias=False, key=KEY))
        self.shared = eqx.nn.Shared(parts, lambda parts: parts[1].weight, lambda parts: parts[0].weight)

    def __call__(self, token: Any) -> Any:
        embed, head = self.shared()
        return head(embed(token))


def test_weights_that_equinox_shares_are_one_array() -> None:
    module = nn.Sequential()
    module.add_module("emb", nn.Embedding(5, 3))
    module.add_module("head", nn.Linear(3, 5, bias=False))
    module.head.weight = module.emb.weight
    tokens = np.array([1, 4, 0], np.int32)
    model = shardconv.convert_module(module, eqx.filter_eval_shape(Tied), {"shared.pytree.0": "emb"})
    assert len(jax.tree.leaves(eqx.filter(model, eqx.is_array))) == 1
    assert abs(np.asarray(jax.vmap(model)(tokens)) - of_torch(module, tokens)).max() < CLOSE


def test_bags_of_embeddings_are_embeddings() -> None:
    bag = nn.EmbeddingBag(5, 3)
    found = shardconv.convert_module(bag, nnx.eval_shape(lambda: nnx.Embed(5, 3, rngs=rngs())), SAME)
    assert np.array_equal(found.embedding[...], bag.weight.detach().numpy())


def test_an_rms_norm_without_an_epsilon_has_that_of_its_dtype() -> None:
    norm = nn.RMSNorm(3)
    with pytest.warns(UserWarning, match="the model has epsilon 1e-06, the module has 1.19209e-07"):
        shardconv.convert_module(norm, nnx.eval_shape(lambda: nnx.RMSNorm(3, rngs=rngs())), SAME)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for eps in (np.finfo(np.float32).eps, 1.1920929e-7):
            model = nnx.eval_shape(lambda eps=eps: nnx.RMSNorm(3, epsilon=float(eps), rngs=rngs()))
            found = shardconv.convert_module(norm, model, SAME)
            assert abs(np.asarray(found(jnp.asarray(X) * 1e-4)) - of_torch(norm, X * np.float32(1e-4))).max() < CLOSE


# What no library has


@pytest.mark.parametrize("library", ["linen", "nnx", "equinox"])
def test_a_projection_of_the_hidden_state_is_refused(library: str) -> None:
    cells: Mapping[str, Callable[[], Any]] = {
        "linen": lambda: {"params": {"cell": jax.eval_shape(linen.OptimizedLSTMCell(4).init, KEY, (X[:, :2],) * 2, X)["params"]}},
        "nnx": lambda: nnx.eval_shape(lambda: nnx.RNN(nnx.OptimizedLSTMCell(3, 4, rngs=rngs()), rngs=rngs())),
        "equinox": lambda: {"cell": eqx.filter_eval_shape(eqx.nn.LSTMCell, 3, 4, key=KEY)},
    }
    said = refusal(nn.LSTM(3, 4, proj_size=2), cells[library](), {"cell": "l0"})
    assert "its cells have no projection (proj_size): write the cell with one" in said


@pytest.mark.parametrize("library", ["linen", "nnx", "equinox"])
def test_a_key_and_value_of_attentions_own_are_refused(library: str) -> None:
    x = np.zeros((1, 2, 12), np.float32)
    layers: Mapping[str, Callable[[], Any]] = {
        "linen": lambda: jax.eval_shape(linen.MultiHeadDotProductAttention(3).init, KEY, x),
        "nnx": lambda: nnx.eval_shape(lambda: nnx.MultiHeadAttention(3, 12, rngs=rngs())),
        "equinox": lambda: eqx.filter_eval_shape(eqx.nn.MultiheadAttention, 3, 12, key=KEY),
    }
    said = refusal(nn.MultiheadAttention(12, 3, add_bias_kv=True), layers[library](), SAME)
    names = {"linen": "Flax Linen", "nnx": "Flax NNX", "equinox": "Equinox"}
    assert f"      {names[library]}: its attention has no key and value of its own (add_bias_kv): write the layer with them" in said


# Layers of a state dict, which says no classes, that their shapes do not tell from others


class Projections(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        return linen.Dense(24, name="c_fc")(linen.Dense(8, name="c_proj")(x))


GPT2 = {"c_proj.weight": (8, 8), "c_proj.bias": (8,), "c_fc.weight": (8, 24), "c_fc.bias": (24,)}


def test_a_square_among_weights_that_lie_the_other_way_round_is_not_guessed() -> None:
    state = {name: np.ones(shape, np.float32) for name, shape in GPT2.items()}
    model = jax.eval_shape(Projections().init, jax.random.key(0), jnp.ones((1, 8)))
    with pytest.raises(InputError) as caught:
        shardconv.convert_module(state, model, {"": ""})
    assert str(caught.value) == (
        "the checkpoint does not fit the model (1 problem):\n"
        "  c_proj (weight (8, 8), bias (8)) fits c_proj as Linear, or as Conv1D, which c_fc is\n"
        '      say which: "c_proj" = "c_proj: Conv1D"'
    )
    with pytest.raises(InputError, match=r"open: c_proj \(weight \(8, 8\), bias \(8\)\) fits c_proj as Linear, or as Conv1D\n"):
        shardconv.convert_module(state, model)
    assert '"c_fc.kernel" = "c_fc.weight"\n' in shardconv.propose_mapping(state, model)
    shardconv.convert_module(state, model, {"": "", "c_proj": "c_proj: Conv1D"})
    plain = {**state, "c_fc.weight": np.ones((24, 8), np.float32)}  # torch's Linear throughout: nothing to ask
    shardconv.convert_module(plain, model, {"": ""})


def test_a_kernel_whose_name_says_transposed_is_not_taken_for_a_convolution() -> None:
    class Up(linen.Module):
        name_of_layer: str

        @linen.compact
        def __call__(self, x: Any) -> Any:
            return linen.ConvTranspose(6, (2, 2), (2, 2), name=self.name_of_layer)(x)

    for name, asked in (("up", True), ("deconv1", True), ("conv_transpose", True), ("upsample", True), ("upper", False), ("conv", False)):
        model = jax.eval_shape(Up(name).init, jax.random.key(0), jnp.ones((1, 4, 4, 6)))
        state = {f"{name}.weight": np.ones((6, 6, 2, 2), np.float32), f"{name}.bias": np.ones(6, np.float32)}
        for mapping in ({"": ""}, None):
            if not asked:
                shardconv.convert_module(state, model, mapping)
                continue
            with pytest.raises(InputError, match=f"fits {name} as Conv2d, or as ConvTranspose2d, transpose_kernel=False"):
                shardconv.convert_module(state, model, mapping)


def test_a_class_of_the_users_own_is_no_linear_by_its_shape() -> None:
    class Mix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(8))

    model = {"params": {"mix": {"kernel": np.ones((8, 8), np.float32), "bias": np.ones(8, np.float32)}}}
    with pytest.raises(InputError) as caught:
        shardconv.convert_module(nn.ModuleDict({"mix": Mix()}), model, {"mix": "mix"})
    assert str(caught.value).splitlines()[1:] == [
        "  mix (Mix: weight (8, 8), bias (8)) fits mix as Linear, or as Conv1D",
        '      say which: "mix" = "mix: Linear"',
    ]


# Lines of a mapping that are wrong


def mistakes(mapping: Any, state: Mapping[str, tuple[int, ...]], **arrays: tuple[int, ...]) -> list[str]:
    tree: dict[str, Any] = {}
    for name, shape in arrays.items():
        module, _, inner = name.rpartition("__")
        tree.setdefault(module, {})[inner] = np.zeros(shape, np.float32)
    with pytest.raises(ShardconvError) as caught:
        shardconv.convert_module({name: np.ones(shape, np.float32) for name, shape in state.items()}, {"params": tree}, mapping)
    return str(caught.value).splitlines()[1:]


def test_a_line_that_speaks_for_nothing_is_told_of() -> None:
    state = {"final_layer_norm.weight": (4,), "fc.weight": (3, 4)}
    found = mistakes({"ln": "final_layernorm", "head": "fc"}, state, ln__scale=(4,), head__kernel=(4, 3))
    assert found[:2] == [
        '  "ln" = "final_layernorm": the checkpoint has no final_layernorm',
        "      did you mean final_layer_norm?",
    ]
    assert mistakes({"ln": "77", "head": "fc"}, {"fc.weight": (3, 4)}, head__kernel=(4, 3)) == [
        '  "ln" = "77": the checkpoint has no 77',
        "      leave the line out, or correct it",
    ]
    assert mistakes({"tok": 3}, {"fc.weight": (3, 4)}, head__kernel=(4, 3)) == [
        "  tok = 3: the model has no such array; a module of the checkpoint is named by text"
    ]


def test_a_wrong_line_is_one_problem() -> None:
    state = {"fc.weight": (3, 4), "fc.bias": (3,)}
    arrays = {"head__kernel": (4, 3), "head__bias": (3,)}
    assert mistakes({"head": "fc", "head.kernel": "fc.weight: o i -> o i"}, state, **arrays) == [
        "  head.kernel = fc.weight: o i -> o i: `o` is not 3 with o = 4 in the shape (3, 4); fc.weight is (3, 4), head.kernel is (4, 3)"
    ]
    assert mistakes({"head": "fc", "head.kernel": "fc.weight: o i -> i o; k=2"}, state, **arrays) == [
        "  head.kernel = fc.weight: o i -> i o; k=2: there is no axis k"
    ]


def test_parameters_of_no_layer_are_stacked_without_dims() -> None:
    state = {f"blocks.{n}.gamma": np.full(4, n, np.float32) for n in range(3)}
    found = shardconv.convert_module(state, {"gamma": np.zeros((3, 4), np.float32)}, {"gamma": "blocks.{n}.gamma"})
    assert found["gamma"][:, 0].tolist() == [0.0, 1.0, 2.0]


def test_a_mapping_may_be_given_as_its_text() -> None:
    state, model = {"fc.weight": np.ones((3, 4), np.float32)}, {"params": {"head": {"kernel": np.zeros((4, 3), np.float32)}}}
    assert shardconv.convert_module(state, model, shardconv.propose_mapping(state, model))["params"]["head"]["kernel"].sum() == 12
    with pytest.raises(ShardconvError, match="it is no TOML: "):
        shardconv.convert_module(state, model, "[mapping]\nhead = fc")
