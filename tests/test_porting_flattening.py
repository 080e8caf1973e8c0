"""Channels that are flattened before a fully connected layer: seen where both runs are followed, and warned of where none is."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("flax")
pytest.importorskip("equinox")

import equinox as eqx  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import linen, nnx  # noqa: E402
from porting_flows import KEY, inputs, shaken  # noqa: E402

import shardconv  # noqa: E402
from shardconv.porting.agreement import same_outputs  # noqa: E402

nn = torch.nn


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with jax.default_matmul_precision("highest"), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def flat_net() -> Any:
    parts = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    return shaken(nn.Sequential(*parts, nn.Flatten(), nn.Linear(4 * 2 * 3, 5)))


class LinenFlat(linen.Module):
    turned: bool = False

    @linen.compact
    def __call__(self, x: Any) -> Any:
        x = linen.BatchNorm(use_running_average=True, epsilon=1e-5)(linen.Conv(4, (3, 3), padding="VALID")(x))
        x = linen.max_pool(linen.relu(x), (2, 2), (2, 2))
        return linen.Dense(5)((x.transpose(0, 3, 1, 2) if self.turned else x).reshape(len(x), -1))


class NnxFlat(nnx.Module):
    def __init__(self, turned: bool, rngs: Any) -> None:
        self.turned = turned
        self.conv = nnx.Conv(3, 4, (3, 3), padding="VALID", rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=True, epsilon=1e-5, rngs=rngs)
        self.head = nnx.Linear(24, 5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = nnx.max_pool(nnx.relu(self.norm(self.conv(x))), (2, 2), (2, 2))
        return self.head((x.transpose(0, 3, 1, 2) if self.turned else x).reshape(len(x), -1))


class EqxFlat(eqx.Module):
    conv: Any
    norm: Any
    pool: Any
    head: Any

    def __init__(self, key: Any) -> None:
        self.conv = eqx.nn.Conv2d(3, 4, 3, key=key)
        self.norm = eqx.nn.BatchNorm(4, "batch", mode="batch", inference=True)
        self.pool = eqx.nn.MaxPool2d(2, 2)
        self.head = eqx.nn.Linear(24, 5, key=key)

    def __call__(self, x: Any, state: Any) -> Any:
        return self.head(self.pool(jax.nn.relu(self.norm(self.conv(x), state)[0])).reshape(-1))


def flat(library: str, turned: bool) -> tuple[Any, Any, Callable[[Any], Any]]:
    """A model, the torch module's input, and a call with the same."""
    x, y = inputs(2, 3, 6, 8)
    last = jnp.moveaxis(y, 1, -1)
    if library == "linen":
        net = LinenFlat(turned)
        return jax.eval_shape(net.init, KEY, last), x, lambda variables: net.apply(variables, last)
    if library == "nnx":
        return nnx.eval_shape(lambda: NnxFlat(turned, nnx.Rngs(0))), x, lambda model: model(last)
    both = eqx.filter_eval_shape(eqx.nn.make_with_state(EqxFlat), KEY)
    return both, x, lambda pair: jax.vmap(lambda one: pair[0](one, pair[1]), axis_name="batch")(y)


REORDERED = ": o (c h w) -> (h w c) o; h=2, w=3"


@pytest.mark.parametrize(
    ("library", "turned", "expected"),
    [
        ("linen", False, REORDERED),
        ("linen", True, ": o i -> i o"),
        ("nnx", False, REORDERED),
        ("nnx", True, ": o i -> i o"),
        ("equinox", False, ""),
    ],
)
def test_what_is_flattened_is_put_in_the_order_in_which_the_model_flattens(library: str, turned: bool, expected: str) -> None:
    model, x, call = flat(library, turned)
    module = flat_net()
    agrees = same_outputs(module, [x], call)
    text = shardconv.propose_mapping(module, model, agrees=agrees)
    (line,) = (line for line in text.splitlines() if "5.weight" in line)
    assert line.endswith(f'= "5.weight{expected}"')
    assert agrees(shardconv.convert_module(module, model, agrees=agrees))


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_what_is_perhaps_flattened_is_warned_of_where_nothing_is_run(library: str) -> None:
    model, x, call = flat(library, False)
    module = flat_net()
    name = "Dense_0.kernel" if library == "linen" else "head.kernel"
    line = f'"{name}" = "5.weight: o (c h w) -> (h w c) o; c=4, h=.."'
    said = f"if this takes 4 flattened channels, and the model has channels last, the line is {line}"
    assert shardconv.propose_mapping(module, model).endswith(  # neither is taken: who edits the file has to
        "\n\n# in doubt: if this takes 4 flattened channels, and the model has channels last, take the first line, with its sizes; "
        f'if not, the second\n# {line}\n# "{name}" = "5.weight: o i -> i o"\n'
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(f'{name}: {said}')}$"):
        found = shardconv.convert_module(module.state_dict(), model)
    agrees = same_outputs(module, [x], call)
    assert not agrees(found)
    written = {name: line.partition(" = ")[2].strip('"').replace("..", "2")}  # the file, with the height filled in
    mapping = {"Conv_0": "0", "BatchNorm_0": "1", "Dense_0": "5"} if library == "linen" else {"conv": "0", "norm": "1", "head": "5"}
    assert agrees(shardconv.convert_module(module, model, {**mapping, **written}))


def test_what_is_not_flattened_is_not_warned_of() -> None:
    """Warnings are errors here: an average over all places, a model that turns back, channels first, a Linear after others, a run."""

    class Pooled(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            x = linen.BatchNorm(use_running_average=True)(linen.Conv(4, (3, 3))(x))
            return linen.Dense(8)(linen.Dense(8)(linen.Dense(5)(x.mean((1, 2)))))

    shapes = jax.eval_shape(Pooled().init, KEY, jnp.zeros((1, 6, 8, 3)))
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5), nn.Linear(5, 8), nn.Linear(8, 8))
    shardconv.convert_module(module, shapes, ignore=[])
    bare = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Linear(24, 5, bias=False))
    shardconv.convert_module(bare, {"conv": {"weight": np.ones((4, 3, 3, 3))}, "head": np.ones((24, 5))})
    both, _, _ = flat("equinox", False)
    shardconv.convert_module(flat_net(), both)
    for turned in (False, True):
        model, x, call = flat("linen", turned)
        agrees = same_outputs(flat_net(), [x], call)
        shardconv.convert_module(flat_net(), model, agrees=agrees)
        if turned:
            shardconv.convert_module(flat_net(), model, agrees=lambda variables, agrees=agrees: agrees(variables))
