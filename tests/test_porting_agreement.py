"""A converted model is run before it is given back, where there is something to run it with; and what that shows is said."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("flax")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402

import shardconv  # noqa: E402
from shardconv.errors import ConfigError, InputError  # noqa: E402
from shardconv.porting.agreement import same_outputs  # noqa: E402
from shardconv.porting.flow import Flow  # noqa: E402
from shardconv.porting.trees import opened  # noqa: E402

nn = torch.nn
LOOK = "      see what is in no array: activations, epsilons, padding, the order in which channels are flattened, the call itself"
TITLE = "the converted model does not compute what PyTorch's does"


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with jax.default_matmul_precision("highest"), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def refusal(kind: type[Exception], run: Callable[[], Any]) -> str:
    with pytest.raises(kind) as caught:
        run()
    return str(caught.value)


# What is certain by names, and still not the same

ONE = nn.Sequential(OrderedDict(fc=nn.Linear(1, 1, bias=False), act=nn.ReLU()))
ONE.fc.weight.data[:] = 1.0
X = torch.tensor([[-1.0], [1.0]])


def one() -> Any:
    return {"params": {"fc": {"kernel": np.zeros((1, 1), np.float32)}}}


def times(tree: Any) -> Any:
    return jnp.asarray(X.numpy()) @ tree["params"]["fc"]["kernel"]


FAULTS: list[tuple[Callable[[Any], Any], str]] = [
    (times, "its result is off by 1, and noise allows 6e-07"),
    (lambda tree: jax.nn.relu(times(tree)).T, "its result is (1, 2), and PyTorch's (2, 1)"),
    (lambda tree: jnp.sqrt(times(tree)), "1 of the 2 numbers of its result are NaN, and none of PyTorch's"),
]


@pytest.mark.parametrize("mapping", [None, {"fc": "fc"}])
@pytest.mark.parametrize(("call", "said"), FAULTS)
def test_a_model_that_names_settle_is_run_too(call: Callable[[Any], Any], said: str, mapping: Any) -> None:
    agrees = same_outputs(ONE, [X], call)
    found = refusal(InputError, lambda: shardconv.convert_module(ONE, one(), mapping, agrees=agrees))
    assert found == f"{TITLE} (1 problem):\n  {said}\n{LOOK}"


@pytest.mark.parametrize("mapping", [None, {"fc": "fc"}])
def test_it_is_run_once(mapping: Any) -> None:
    runs = []

    def agrees(tree: Any) -> bool:
        runs.append(np.asarray(tree["params"]["fc"]["kernel"]).item())
        return len(runs) < 2

    assert shardconv.convert_module(ONE, one(), mapping, agrees=agrees) and runs == [1.0]
    found = refusal(InputError, lambda: shardconv.convert_module(ONE, one(), mapping, agrees=agrees))
    assert found == f"{TITLE} (1 problem):\n  agrees= says so\n{LOOK}"


def test_lines_that_no_names_speak_for_are_listed() -> None:
    """Two norms are exchanged in the mapping; the model is that of the user, and stays as it was."""

    class Norms(nnx.Module):
        def __init__(self) -> None:
            self.norm1, self.norm2 = (nnx.LayerNorm(4, epsilon=1e-5, rngs=nnx.Rngs(0)) for _ in range(2))

    module = nn.Sequential(OrderedDict(norm1=nn.LayerNorm(4), norm2=nn.LayerNorm(4, eps=1e-3)))
    for place, norm in enumerate(module):
        norm.weight.data[:] = torch.tensor([1.0, 2.0, 3.0, 4.0 + place])
        norm.bias.data[:] = torch.tensor([4.0, 2.0, 1.0, 1.0 - place])
    x, model = torch.tensor([[1.0, 2.0, 3.0, 5.0]]), Norms()
    agrees = same_outputs(module, [x], lambda model: model.norm2(model.norm1(jnp.asarray(x.numpy()))))
    mapping = {"norm1": "norm2", "norm2": "norm1"}
    found = refusal(InputError, lambda: shardconv.convert_module(module, model, mapping, agrees=agrees)).splitlines()
    assert found[0] == f"{TITLE} (3 problems):" and found[1].startswith("  its result is off by ")
    assert found[2:] == [
        LOOK,
        "  norm1 has epsilon 1e-05, norm2 has 0.001",
        "  names do not say it: norm1 is norm2, norm2 is norm1",
        "      check these lines of the mapping",
    ]
    assert np.array_equal(model.norm1.scale[...], np.ones(4))
    model.norm2.epsilon = 1e-3
    assert shardconv.convert_module(module, model, agrees=agrees) is model and agrees(model)


@pytest.mark.parametrize("last", [False, True])
def test_what_is_flattened_is_in_doubt_only_where_the_model_does_not_agree(last: bool) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 1), flat=nn.Flatten(), fc=nn.Linear(16, 2)))
    x = torch.randn(2, 3, 2, 2)
    params = {"conv": {"kernel": np.zeros((1, 1, 3, 4), np.float32), "bias": np.zeros(4, np.float32)}}
    params |= {"fc": {"kernel": np.zeros((16, 2), np.float32), "bias": np.zeros(2, np.float32)}}

    def call(tree: Any) -> Any:
        conv, fc = tree["params"]["conv"], tree["params"]["fc"]
        y = jnp.moveaxis(jnp.asarray(x.numpy()), 1, -1) @ conv["kernel"][0, 0] + conv["bias"]
        return (y if last else jnp.moveaxis(y, -1, 1)).reshape(2, -1) @ fc["kernel"] + fc["bias"]

    agrees = same_outputs(module, [x], call)

    def converted() -> Any:
        return shardconv.convert_module(module, {"params": params}, {"": ""}, agrees=agrees)

    if last:
        assert '  fc.kernel: if this takes 4 flattened channels, and the model has channels last, the line is "fc.kernel" = ' in refusal(
            InputError, converted
        )
    else:
        assert agrees(converted())


# What is open, and was run


def squares(*weights: float, bend: bool = True) -> tuple[Any, Any, Any, Callable[[Any], Any]]:
    """A chain of layers of two numbers, with names that say nothing, in a call that cannot be followed: what is open is tried."""
    parts = [part for _ in weights for part in (nn.Linear(2, 2, bias=False), *([nn.ReLU()] if bend else []))]
    module = nn.Sequential(*parts)
    for layer, weight in zip((part for part in parts if isinstance(part, nn.Linear)), weights, strict=True):
        layer.weight.data[:] = torch.tensor([[weight, 1.0], [0.0, weight]])
    tree = {"params": {f"Dense_{'zyxwvut'[n]}": {"kernel": np.zeros((2, 2), np.float32)} for n in range(len(weights))}}

    def call(tree: Any) -> Any:
        y = np.array([[1.0, 2.0]], np.float32)
        for layer in tree["params"].values():
            y = y @ np.asarray(layer["kernel"])
            y = np.maximum(y, 0.0) if bend else y
        return y

    return module, torch.tensor([[1.0, 2.0]]), tree, call


def open_report(module: Any, x: Any, tree: Any, call: Callable[[Any], Any]) -> list[str]:
    """The last lines: what running the model has shown."""
    found = refusal(InputError, lambda: shardconv.convert_module(module, tree, agrees=same_outputs(module, [x], call)))
    lines = found.splitlines()
    assert "      complete what shardconv.propose_mapping or `shardconv init` writes" in lines and "or pass agrees=" not in found
    return [line for line in lines if "the model was" in line]


def test_of_the_same_arrays_there_is_one_run() -> None:
    """Each of six orders is tried once; the one that agrees is not run again before it is given back."""
    module, _, tree, call = squares(1.0, 2.0, 3.0)
    for place, layer in enumerate(module[::2]):
        layer.weight.data[1, 0] = place  # no two of them commute
    expected, runs = module(torch.tensor([[1.0, 2.0]])).detach().numpy(), []

    def agrees(tree: Any) -> bool:
        runs.append(tuple(float(layer["kernel"][0, 0]) for layer in tree["params"].values()))
        return bool(np.array_equal(call(tree), expected))

    shardconv.convert_module(module, tree, agrees=agrees)
    assert len(runs) == len(set(runs)) == 6


def test_that_results_have_other_shapes_is_said_and_nothing_more_is_run() -> None:
    module, x, tree, call = squares(1.0, 2.0, 3.0)
    runs = []

    def turned(tree: Any) -> Any:
        runs.append(tree)
        return call(tree).T

    assert open_report(module, x, tree, turned) == ["  the model was run: its result is (2, 1), and PyTorch's (1, 2)"]
    assert len(runs) == 2  # to be followed, and run


def test_the_nearest_of_the_orders_that_were_tried_is_said() -> None:
    module, x, tree, call = squares(1.0, 2.0, 3.0)
    for place, layer in enumerate(module[::2]):
        layer.weight.data[1, 0] = place
    assert open_report(module, x, tree, lambda tree: call(tree) + 0.5) == [
        "  the model was run: none of the 6 orders that were tried agrees; the nearest: its result is off by 0.5, and noise allows 2.2e-05"
    ]


def test_that_there_are_too_many_orders_is_said() -> None:
    module, x, tree, call = squares(*[1.0, 2.0, 3.0, 1.0, 2.0, 3.0, 1.0])
    assert open_report(module, x, tree, lambda tree: call(tree) + np.inf) == [
        "  the model was run: the only order that was tried does not agree, of too many to try them all; "
        "the nearest: its result is off by inf, and noise allows 0.00022"
    ]


def test_that_orders_agree_which_differ_is_said() -> None:
    module, x, tree, call = squares(1.0, 2.0, bend=False)
    module[1].weight.data[:] = torch.tensor([[3.0, 1.0], [0.0, 3.0]])  # the two commute
    assert open_report(module, x, tree, call) == ["  the model was run: 2 of the 2 orders that were tried agree, and differ in these"]


def test_that_no_order_fills_the_model_is_said() -> None:
    module, x, tree, call = squares(1.0, 2.0)
    tree["params"]["Dense_x"] = {"kernel": np.zeros((2, 2), np.float32)}
    assert open_report(module, x, tree, call) == ["  the model was not run: in no order do the open layers fill all its arrays"]
    turned = open_report(module, x, tree, lambda tree: call(tree).T)
    assert turned == ["  the model was run: its result is (2, 1), and PyTorch's (1, 2)"]

    def fails(tree: Any) -> Any:
        raise TypeError("no zeros")

    assert open_report(module, x, tree, fails) == ["  the model was run, of zeros: it raised TypeError: no zeros"]


def test_a_model_that_cannot_be_filled_is_not_run() -> None:
    """Two layers are open, and one array has no layer."""
    module, _, tree, _ = squares(1.0, 2.0)
    tree["params"]["other"] = np.zeros(3, np.float32)
    found = refusal(InputError, lambda: shardconv.convert_module(module, tree, agrees=lambda tree: tree["nothing"]))
    assert "\n  other (3): nothing fills it\n" in found
    assert "\n  the model was not run: in no order do the open layers fill all its arrays\n" in found


# What PyTorch's module takes and gives


class Several(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.fc, self.kind = nn.Linear(1, 1, bias=False), kind

    def forward(self, x: Any, y: Any = None, flag: bool = True) -> Any:
        found = self.fc(x) + (0.0 if y is None else 2 * y)
        return self.kind(found)


@pytest.mark.parametrize("kind", [lambda y: (y, 3.0), lambda y: [None, y], lambda y: {"loss": None, "logits": y}])
def test_the_first_tensor_of_several_is_compared(kind: Any) -> None:
    module = Several(kind)
    agrees = same_outputs(module, [X], times)
    assert agrees(shardconv.convert_module(module, one(), agrees=agrees))


def test_what_is_no_tensor_is_refused() -> None:
    title = "the results cannot be compared (1 problem):\n  "
    said = refusal(ConfigError, lambda: same_outputs(Several(lambda y: (3, "y")), [X], times))
    remedy = "      wrap it in a torch.nn.Module that gives the tensor to compare"
    assert said == f"{title}PyTorch's module gives a tuple without tensors\n{remedy}"
    said = refusal(ConfigError, lambda: same_outputs(Several(lambda y: y / 0 * 0), [X], times))
    assert said == f"{title}2 of the 2 numbers of PyTorch's result are NaN\n      give inputs for which it computes numbers"
    agrees = same_outputs(ONE, [X], lambda tree: (times(tree), 3))
    said = refusal(ConfigError, lambda: shardconv.convert_module(ONE, one(), agrees=agrees))
    remedy = "      let the call give one array, which is compared with the first tensor of PyTorch's result"
    assert said == f"{title}the call gives a tuple\n{remedy}"


def test_a_result_that_is_all_noise_is_refused() -> None:
    """Anything would agree with it: a module that drops out at random."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5))
    found = refusal(ConfigError, lambda: same_outputs(module, [torch.ones(3, 4)], times)).splitlines()
    assert found[1].startswith("  PyTorch's result is up to ") and found[1].endswith(" from what it is in float64")
    assert found[2] == "      call module.eval(), if it has dropout; or give inputs for which it is stable"
    assert same_outputs(module.eval(), [torch.ones(3, 4)], times).bound < 1e-4


def test_equal_infinities_are_equal() -> None:
    module = nn.Sequential(OrderedDict(fc=ONE.fc, log=nn.Threshold(0.0, -np.inf)))
    agrees = same_outputs(module, [X], lambda tree: jnp.where(times(tree) > 0, times(tree), -jnp.inf))
    assert agrees(shardconv.convert_module(module, one(), agrees=agrees))
    assert not agrees({"params": {"fc": {"kernel": -np.ones((1, 1), np.float32)}}})


def test_inputs_may_go_by_keyword() -> None:
    """Followed too: the flow of two squares is settled though their names say nothing."""
    torch.manual_seed(0)

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Any, *, mask: Any, flag: bool) -> Any:
            return {"out": self.b(torch.relu(self.a(x))) * mask}

    module, x, mask = Chain(), torch.randn(2, 4), torch.tensor([[1.0], [2.0]])
    tree = {"params": {f"Dense_{n}": {"kernel": np.zeros((4, 4), np.float32), "bias": np.zeros(4, np.float32)} for n in range(2)}}

    def call(tree: Any) -> Any:
        p = tree["params"]
        hidden = jax.nn.relu(jnp.asarray(x.numpy()) @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"])
        return (hidden @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]) * jnp.asarray(mask.numpy())

    agrees = same_outputs(module, {"x": x, "mask": mask, "flag": True}, call)
    assert isinstance(agrees.flow(opened(tree)), Flow)
    assert agrees(shardconv.convert_module(module, tree, agrees=agrees))


def test_a_model_of_transformers_is_taken_as_it_is() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, max_position_embeddings=6
    )
    model = transformers.BertModel(config).eval()
    tokens = torch.tensor([[1, 2, 3], [4, 5, 0]])
    expected = model(tokens).last_hidden_state.detach().numpy()
    for inputs in ([tokens], {"input_ids": tokens, "use_cache": False}):
        agrees = same_outputs(model, inputs, lambda tree: tree)
        assert agrees(expected) and not agrees(expected + np.float32(1e-3))
