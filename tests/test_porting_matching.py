"""Mappings that nobody wrote: what names and shapes make certain, what stays open and is said to, and what running the model settles."""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax")

import jax

import shardconv
from shardconv.errors import InputError
from shardconv.porting.matching import likeness, natural, words

Array = np.ndarray[Any, Any]


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


def numbers(*shape: int) -> Array:
    return np.random.default_rng(len(shape) + sum(shape)).standard_normal(shape).astype(np.float32)


def nested(flat: Mapping[str, Array]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, array in flat.items():
        *path, last = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = array
    return {"params": tree}


# A transformer, as Hugging Face names its parts and as a Linen code base does

BLOCK = {
    "attention.q_proj.weight": ("attn.query.kernel", (8, 8)),
    "attention.q_proj.bias": ("attn.query.bias", (8,)),
    "attention.k_proj.weight": ("attn.key.kernel", (8, 8)),
    "attention.v_proj.weight": ("attn.value.kernel", (8, 8)),
    "attention.v_proj.bias": ("attn.value.bias", (8,)),
    "attention.o_proj.weight": ("attn.out.kernel", (8, 8)),
    "attention.o_proj.bias": ("attn.out.bias", (8,)),
    "norm1.weight": ("norm1.scale", (8,)),
    "norm1.bias": ("norm1.bias", (8,)),
    "norm2.weight": ("norm2.scale", (8,)),
    "norm2.bias": ("norm2.bias", (8,)),
    "mlp.up_proj.weight": ("mlp.wi.kernel", (12, 8)),
    "mlp.down_proj.weight": ("mlp.wo.kernel", (8, 12)),
}
ENDS = {
    "embeddings.word.weight": ("embed.embedding", (11, 8)),
    "norm.weight": ("final_norm.scale", (8,)),
    "head.weight": ("head.kernel", (7, 8)),
}


def transformer() -> tuple[dict[str, Array], dict[str, Any], dict[str, str]]:
    """A state dict, an empty model, and which array is which tensor."""
    pairs = {f"encoder.layer.{i}.{there}": (f"layers_{i}.{here}", shape) for i in range(3) for there, (here, shape) in BLOCK.items()}
    pairs |= ENDS
    state = {there: numbers(*shape) + place for place, (there, (_, shape)) in enumerate(pairs.items())}
    model = {here: np.zeros(shape[::-1] if here.endswith("kernel") else shape, np.float32) for here, shape in pairs.values()}
    return state, nested(model), {here: there for there, (here, _) in pairs.items()}


def test_names_that_code_bases_spell_differently_are_told_apart() -> None:
    state, model, truth = transformer()
    found = shardconv.convert_module(state, model)["params"]
    for here, there in truth.items():
        node = found
        for part in here.split("."):
            node = node[part]
        assert np.array_equal(node, state[there].T if here.endswith("kernel") else state[there]), here


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("encoder.layer.3.attention.q_proj", "layers_3.attn.query"),
        ("model.blocks.0.norm1", "Block_0.norm1"),
        ("bn1", "norm1"),
        ("fc", "Dense"),
    ],
)
def test_words_of_one_meaning(one: str, other: str) -> None:
    assert words(one) == words(other)


def test_numbers_must_agree() -> None:
    assert likeness("layer.1.fc", "layers_2.fc") == 0.0
    assert sorted(["Conv_10", "Conv_9"], key=natural) == ["Conv_9", "Conv_10"]


# What names leave open


def two_squares(*targets: str) -> tuple[dict[str, Array], dict[str, Any]]:
    state = {"first.weight": numbers(4, 4), "second.weight": numbers(4, 4)[::-1].copy(), "last.weight": numbers(3, 4)}
    return state, nested({**{f"{name}.kernel": np.zeros((4, 4), np.float32) for name in targets}, "z.kernel": np.zeros((4, 3), np.float32)})


REPORT = """\
the checkpoint does not fit the model (5 problems):
  open: first (weight (4, 4)) fits Dense_0, Dense_1, and its name does not say which
  open: second (weight (4, 4)) fits Dense_0, Dense_1, and its name does not say which
  Dense_0.kernel (4, 4): nothing fills it
      map it, or make the model without it
  Dense_1.kernel (4, 4): nothing fills it
      map it, or make the model without it
  2 of 3 layers are open
      complete what shardconv.propose_mapping or `shardconv init` writes; or pass agrees=, a function that runs the model"""


def test_what_is_not_certain_is_refused_and_listed() -> None:
    state, model = two_squares("Dense_0", "Dense_1")
    with pytest.raises(InputError) as caught:
        shardconv.convert_module(state, model)
    assert str(caught.value) == REPORT


def test_a_proposal_is_a_file_to_complete(tmp_path: Path) -> None:
    state, model = two_squares("Dense_0", "Dense_1")
    text = shardconv.propose_mapping(state, model)
    assert text.splitlines()[-7:] == [
        '"z.kernel" = "last.weight: o i -> i o"',
        "",
        "# open: fits first, second; the array is (4, 4)",
        '# "Dense_0.kernel" = ""',
        "",
        "# open: fits first, second; the array is (4, 4)",
        '# "Dense_1.kernel" = ""',
    ]
    path = tmp_path / "port.toml"
    text = text.replace('# "Dense_0.kernel" = ""', '"Dense_0" = "second"')
    path.write_text(text.replace('# "Dense_1.kernel" = ""', '"Dense_1" = "first"'))
    found = shardconv.convert_module(state, model, path)["params"]
    assert np.array_equal(found["Dense_0"]["kernel"], state["second.weight"].T)
    assert np.array_equal(found["Dense_1"]["kernel"], state["first.weight"].T)


def test_a_complete_proposal_reads_back_as_it_was(tmp_path: Path) -> None:
    state, model, _ = transformer()
    path = tmp_path / "port.toml"
    path.write_text(shardconv.propose_mapping(state, model, ignore=["*.inv_freq"]))
    found, expected = shardconv.convert_module({**state, "rope.inv_freq": numbers(3)}, model, path), shardconv.convert_module(state, model)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))


# What running the model settles

X = numbers(5, 4)


def chained(tree: Mapping[str, Any], *names: str) -> Array:
    y = X
    for name in names:
        y = np.maximum(y @ np.asarray(tree["params"][name]["kernel"]), 0.0)
    return y


def test_running_the_model_settles_square_matrices() -> None:
    """Both matrices are square and have names that say nothing: which is which, and that neither is used the other way round."""
    state, model = two_squares("Dense_0", "Dense_1")
    expected = np.maximum(np.maximum(X @ state["first.weight"].T, 0) @ state["second.weight"].T, 0) @ state["last.weight"].T
    for names in (("Dense_0", "Dense_1"), ("Dense_1", "Dense_0")):
        tried = []

        def agrees(tree: Any, names: tuple[str, ...] = names, tried: list[float] = tried) -> bool:  # type: ignore[type-arg]
            y = chained(tree, *names) @ np.asarray(tree["params"]["z"]["kernel"])
            tried.append(float(abs(y - expected).max()))
            return tried[-1] < 1e-5

        found = shardconv.convert_module(state, model, agrees=agrees)["params"]
        assert np.array_equal(found[names[0]]["kernel"], state["first.weight"].T)
        assert sorted(tried)[0] < 1e-5 and sorted(tried)[1] > 0.1


def test_agreement_is_measured_by_noise() -> None:
    torch = pytest.importorskip("torch")
    from shardconv.porting.agreement import same_outputs

    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.ReLU(), torch.nn.Linear(4, 4, bias=False), torch.nn.ReLU())
    model = nested({f"Dense_{i}.kernel": np.zeros((4, 4), np.float32) for i in range(2)})
    agrees = same_outputs(layers, [torch.from_numpy(X)], lambda tree: chained(tree, "Dense_1", "Dense_0"))
    found = shardconv.convert_module(layers, model, agrees=agrees)
    assert np.array_equal(found["params"]["Dense_1"]["kernel"], layers[0].weight.detach().numpy().T)
    kernel = np.asarray(found["params"]["Dense_0"]["kernel"])
    found["params"]["Dense_0"]["kernel"] = kernel + np.float32(1e-5)
    assert not agrees(found)
    assert not same_outputs(layers, [torch.from_numpy(X)], lambda tree: chained(tree, "Dense_1", "Dense_0")[:1])(found)


def test_two_ways_that_both_agree_are_refused() -> None:
    state, model = two_squares("Dense_0", "Dense_1")
    with pytest.raises(InputError, match="2 of 3 layers are open"):
        shardconv.convert_module(state, model, agrees=lambda tree: True)
    with pytest.raises(InputError, match="2 of 3 layers are open"):
        shardconv.convert_module(state, model, agrees=lambda tree: False)


def test_many_layers_are_tried_in_order() -> None:
    """Twelve equal layers have half a billion orders; the one of both sides' names is tried, and Conv_10 comes after Conv_9 in it."""
    state = {f"net.{2 * i}.weight": numbers(3, 3) + i for i in range(12)}
    model = nested({f"Dense_{i}.kernel": np.zeros((3, 3), np.float32) for i in range(12)})
    tried = []

    def agrees(tree: Any) -> bool:
        tried.append([float(tree["params"][f"Dense_{i}"]["kernel"][0, 0] - numbers(3, 3)[0, 0]) for i in range(12)])
        return np.allclose(tried[-1], range(12), atol=1e-5)

    assert shardconv.convert_module(state, model, agrees=agrees)
    assert len(tried) == 1


def test_a_form_that_shapes_leave_open_is_settled_too() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("flax")
    from flax import linen

    up = torch.nn.Sequential()
    up.add_module("up", torch.nn.ConvTranspose2d(3, 3, 2, bias=False))
    x = numbers(1, 3, 4, 4)
    expected = np.moveaxis(up(torch.from_numpy(x)).detach().numpy(), 1, -1)
    model = {"params": {"up": {"kernel": np.zeros((2, 2, 3, 3), np.float32)}}}
    for turned in (True, False):
        layer = linen.ConvTranspose(3, (2, 2), padding="VALID", use_bias=False, transpose_kernel=turned)

        def agrees(tree: Any, layer: Any = layer) -> bool:
            y = np.asarray(layer.apply({"params": tree["params"]["up"]}, np.moveaxis(x, 1, -1)))
            return bool(abs(y - expected).max() < 1e-5)

        found = np.asarray(shardconv.convert_module(up, model, agrees=agrees)["params"]["up"]["kernel"])
        weight = up.up.weight.detach().numpy()
        assert np.array_equal(found, weight.transpose(2, 3, 1, 0) if turned else weight[:, :, ::-1, ::-1].transpose(2, 3, 0, 1))


# Heads as an axis, and parameters that are no layer's


def test_heads_are_an_axis_where_the_model_has_one() -> None:
    """As in Flax's own attention: a Linear of PyTorch fits by the rank of the kernel."""
    state = {f"attn.{part}_proj.weight": numbers(6, 8) + place for place, part in enumerate("qkv")}
    state |= {"attn.o_proj.weight": numbers(8, 6), "attn.q_proj.bias": numbers(6)}
    flat = {f"attn.{name}.kernel": np.zeros((8, 2, 3), np.float32) for name in ("query", "key", "value")}
    flat |= {"attn.out.kernel": np.zeros((2, 3, 8), np.float32), "attn.query.bias": np.zeros((2, 3), np.float32)}
    found = shardconv.convert_module(state, nested(flat))["params"]["attn"]
    for part, name in zip("qkv", ("query", "key", "value"), strict=True):
        assert np.array_equal(found[name]["kernel"], state[f"attn.{part}_proj.weight"].reshape(2, 3, 8).transpose(2, 0, 1))
    assert np.array_equal(found["out"]["kernel"], state["attn.o_proj.weight"].reshape(8, 2, 3).transpose(1, 2, 0))
    assert np.array_equal(found["query"]["bias"], state["attn.q_proj.bias"].reshape(2, 3))


def test_a_parameter_that_is_no_layers_takes_the_side_that_fits() -> None:
    state = {"up.weight": numbers(5, 3), "norm.weight": numbers(3)}
    tree = {"up": np.zeros((3, 5), np.float32), "norm": np.zeros(3, np.float32)}
    found = shardconv.convert_module(state, tree)
    assert np.array_equal(found["up"], state["up.weight"].T) and np.array_equal(found["norm"], state["norm.weight"])


def test_a_square_parameter_may_be_on_either_side() -> None:
    state, tree = {"up.weight": numbers(4, 4)}, {"up": np.zeros((4, 4), np.float32)}
    with pytest.raises(InputError) as caught:
        shardconv.convert_module(state, tree, {"": ""})
    assert "up (weight (4, 4)) fits up as Linear, input times array, or as Linear, array times input" in str(caught.value)
    with pytest.raises(InputError, match="1 of 1 layers are open"):
        shardconv.convert_module(state, tree)
    for other in (False, True):
        expected = X @ (state["up.weight"] if other else state["up.weight"].T)
        found = shardconv.convert_module(state, tree, agrees=lambda tree, y=expected: np.allclose(X @ np.asarray(tree["up"]), y, atol=1e-5))
        assert np.array_equal(found["up"], state["up.weight"] if other else state["up.weight"].T)


BARE = {"embed.cls_token": (1, 1, 8), "embed.mask_token": (1, 1, 8), "rope.freq": (4,)}
BARE |= {"block.0.scale1.gamma": (8,), "block.1.scale1.gamma": (8,)}


def bare(*names: str) -> dict[str, Any]:
    """A model with arrays of no layer: two tokens, two scales and a vector, under these names."""
    shapes = [(8,), (8,), (4,), (8,), (8,)]
    return nested({name: np.zeros(shape, np.float32) for name, shape in zip(names, shapes, strict=True)})


def test_parameters_of_no_layer_go_by_their_names_and_shapes() -> None:
    state = {name: numbers(*shape) + place for place, (name, shape) in enumerate(BARE.items())}
    model = bare("class_token", "mask_token", "rope", "blocks.0.scale1", "blocks.1.scale1")
    found = shardconv.convert_module(state, model)["params"]
    for place, name in zip(("class_token", "mask_token", "rope"), ("embed.cls_token", "embed.mask_token", "rope.freq"), strict=True):
        assert np.array_equal(found[place], state[name].reshape(-1))
    assert np.array_equal(found["blocks"]["1"]["scale1"], state["block.1.scale1.gamma"])


@pytest.mark.parametrize(
    ("names", "left"),
    [
        (("class_token", "mask_token", "bands", "blocks.0.scale1", "blocks.1.scale1"), {"bands"}),  # it alone is of its shape
        (("class_token", "mask_token", "rope", "a.gain", "b.gain"), {"a.gain", "b.gain"}),
        (("a.token", "b.token", "rope", "blocks.0.scale1", "blocks.1.scale1"), {"a.token", "b.token"}),
    ],
)
def test_a_name_that_says_nothing_leaves_a_parameter_open(names: tuple[str, ...], left: set[str]) -> None:
    state = {name: numbers(*shape) + place for place, (name, shape) in enumerate(BARE.items())}
    lines = shardconv.propose_mapping(state, bare(*names)).splitlines()
    assert {line.split('"')[1] for line in lines if line.startswith('# "')} == left


def mlp(*widths: int) -> tuple[dict[str, Array], dict[str, Any]]:
    """A state dict and an empty model whose names say nothing, for layers from width to width."""
    sides = list(pairwise(widths))
    state = {f"net.{2 * i}.weight": numbers(after, before) + i for i, (before, after) in enumerate(sides)}
    return state, nested({f"{'zyx'[i]}.kernel": np.zeros(side, np.float32) for i, side in enumerate(sides)})


def test_a_small_twin_of_other_sizes_settles_what_is_square(tmp_path: Path) -> None:
    """A mapping has no sizes, so that of a twin, whose shapes leave nothing open, is that of the model."""
    state, model = mlp(4, 4, 4, 4)
    with pytest.raises(InputError, match="3 of 3 layers are open"):
        shardconv.convert_module(state, model)
    path = tmp_path / "port.toml"
    path.write_text(shardconv.propose_mapping(*mlp(2, 3, 5, 7)))
    found = shardconv.convert_module(state, model, path)["params"]
    assert all(np.array_equal(found["zyx"[i]]["kernel"], state[f"net.{2 * i}.weight"].T) for i in range(3))
