"""What a model does with its arrays, followed in a run of torch and in a jaxpr, against what stands in the code."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("flax")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from shardconv.porting.jax_uses import jax_uses  # noqa: E402
from shardconv.porting.torch_uses import torch_uses  # noqa: E402
from shardconv.porting.trees import opened  # noqa: E402
from shardconv.porting.uses import Atom, Uses, dims_of, reshaped, resized, spread  # noqa: E402

nn, functional = torch.nn, torch.nn.functional
X = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
SHAPES = {"a": (6, 6), "b": (6, 6), "c": (6, 6), "s": (6,), "stack": (4, 6, 6)}
Call = Callable[[Any, Any], Any]


@pytest.fixture(autouse=True)
def broadcasting() -> Iterator[None]:
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


class Arrays(nn.Module):
    """A module that is a function of its arrays and its input."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.call = call

    def forward(self, x: Any) -> Any:
        return self.call(self, x)


def in_torch(call: Call, x: Any = X) -> Uses:
    return torch_uses(Arrays(call), [torch.from_numpy(x)])


class Named:
    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self.__dict__.update(arrays)


def in_jax(call: Call, x: Any = X) -> Uses:
    tree = opened({name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()})
    return jax_uses(lambda arrays: call(Named(arrays), jnp.asarray(x)), tree, [x])


def axes(uses: Uses, name: str) -> set[tuple[int | str, ...]]:
    """The axes that an array is contracted along, one tuple for each way."""
    return {tuple(sorted({atom.axis for atom in atoms}, key=str)) for atoms in uses.contracted.get(name, ())}


def before(uses: Uses) -> dict[str, str]:
    """For each array that comes after any, all that do, and `*` for each product of two results."""
    names = {node: name if layer is None else f"{name}{layer}" for (name, layer), node in uses.nodes.items()}
    products = set(uses.products)
    found = {}
    for node, name in names.items():
        if node not in products and uses.before[node]:
            found[name] = " ".join(sorted("*" if other in products else names[other] for other in uses.each(uses.before[node])))
    return found


@pytest.mark.parametrize("side", [in_torch, in_jax])
@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda m, x: x @ m.a, {(0,)}),
        (lambda m, x: x @ m.a.T, {(1,)}),
        (lambda m, x: x @ m.a + x @ m.a.T, {(0,), (1,)}),
        (lambda m, x: x @ m.a.reshape(2, 3, 6).reshape(6, 6), {(0,)}),
        (lambda m, x: x @ m.a.reshape(36).reshape(6, 6).T, {(1,)}),
        (lambda m, x: x[:, :2] @ m.a.reshape(6, 3, 2)[:, 1].T, {(1,)}),
        (lambda m, x: x[:, :3] @ m.a[:, 3:].T, {(1,)}),
        (lambda m, x: x[:, :3] @ m.a[3:], {(0,)}),
        (lambda m, x: x @ (m.a * m.s), {(0,)}),
        (lambda m, x: x @ m.stack[2], {(1,)}),
        (lambda m, x: x * m.a[0], set()),
    ],
)
def test_the_axes_that_are_contracted(side: Callable[[Call], Uses], call: Call, expected: set[Any]) -> None:
    assert axes(side(call), "stack" if expected == {(1,)} and "stack" in call.__code__.co_names else "a") == expected


def test_a_digit_of_an_axis_is_followed() -> None:
    """Of `(heads half)` the inner digit is contracted: stride one, size three."""
    uses = in_torch(lambda m, x: x[:, :3] @ m.a.unflatten(1, (2, 3))[:, 0].T)
    assert uses.contracted["a"] == {frozenset({Atom(1, 1, 3)})}
    assert in_jax(lambda m, x: x[:, :3] @ m.a.reshape(6, 2, 3)[:, 0].T).contracted["a"] == uses.contracted["a"]


def test_einsum_says_the_same_of_both() -> None:
    spelt = "no,oi->ni"
    assert axes(in_torch(lambda m, x: torch.einsum(spelt, x, m.a)), "a") == {(0,)}
    assert axes(in_jax(lambda m, x: jnp.einsum(spelt, x, m.a)), "a") == {(0,)}


def test_lookups_contract_the_axis_that_numbers_go_along() -> None:
    rows = np.array([[1, 2], [0, 5]])
    assert axes(in_torch(lambda m, x: functional.embedding(x, m.a), rows), "a") == {(0,)}
    assert axes(in_torch(lambda m, x: m.a[:, x], rows), "a") == {(1,)}
    assert axes(in_jax(lambda m, x: jnp.take(m.a, x, axis=0), rows), "a") == {(0,)}
    assert axes(in_jax(lambda m, x: jnp.take(m.a, x, axis=1), rows), "a") == {(1,)}
    assert axes(in_jax(lambda m, x: jax.nn.one_hot(x, 6) @ m.a, rows), "a") == {(0,)}


def test_a_matrix_that_two_names_have_is_used_under_both() -> None:
    module = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 6, bias=False))
    module[2].weight = module[0].weight
    uses = torch_uses(module, [torch.from_numpy(X)])
    assert axes(uses, "0.weight") == axes(uses, "2.weight") == {(1,)}
    assert uses.bits(["0.weight"]) == uses.bits(["2.weight"]) == 1


# What comes after what

CHAIN = {"b": "a", "s": "a b", "c": "a b s"}


@pytest.mark.parametrize("side", [in_torch, in_jax])
def test_the_order_is_that_of_the_data_and_not_of_the_code(side: Callable[[Call], Uses]) -> None:
    def call(m: Any, x: Any) -> Any:
        after = m.c.T * 2.0  # first in the code, last in the data
        return ((x @ m.a) @ m.b * m.s) @ after

    assert before(side(call)) == CHAIN
    assert before(side(lambda m, x: (x @ m.a) * 2.0 + x @ m.b + m.s)) == {}  # a sum has its terms in any order
    assert before(side(lambda m, x: ((x @ m.a) @ (x @ m.b).T) @ (x @ m.c) * m.s)) == {"s": "* * a b c"}


def test_writing_into_a_tensor_is_seen_by_all_that_share_it() -> None:
    def call(m: Any, x: Any) -> Any:
        room = torch.zeros(3, 6)
        view = room[:, :3]
        view.copy_((x @ m.a)[:, :3])
        return room @ m.b

    assert before(in_torch(call)) == {"b": "a"}


def test_functions_in_functions_are_followed() -> None:
    """A jit, a derivative's rule of one's own, rematerialisation, a branch and a loop."""

    @jax.custom_jvp
    def doubled(x: Any) -> Any:
        return 2.0 * x

    doubled.defjvp(lambda primals, tangents: (doubled(*primals), tangents[0]))

    def call(m: Any, x: Any) -> Any:
        y = jax.checkpoint(lambda x: doubled(jax.jit(lambda x, a: x @ a)(x, m.a)))(x)
        return jax.lax.cond(y.sum() > 0, lambda y: y @ m.b, lambda y: y * m.s, y) @ m.c

    assert before(in_jax(call)) == {"b": "a", "s": "a", "c": "a b s"}

    def loop(m: Any, x: Any) -> Any:
        return jax.lax.fori_loop(0, x.shape[0] + jnp.int32(x[0, 0]), lambda _, y: (y @ m.a) @ m.b, x) @ m.c

    assert before(in_jax(loop)) == {"a": "a b", "b": "a b", "c": "a b"}  # the second turn is after the first


def test_a_scan_has_a_node_for_each_layer() -> None:
    def call(m: Any, x: Any, reverse: bool = False) -> Any:
        return jax.lax.scan(lambda y, w: (jnp.tanh(y @ w), None), x, m.stack, reverse=reverse)[0] @ m.a

    assert before(in_jax(call))["stack3"] == "stack0 stack1 stack2" and "stack0" not in before(in_jax(call))
    assert before(in_jax(lambda m, x: call(m, x, True)))["stack0"] == "stack1 stack2 stack3"

    def unrolled(m: Any, x: Any) -> Any:
        for layer in range(4):
            x = jnp.tanh(x @ m.stack[layer])
        return x @ m.a

    assert before(in_jax(unrolled)) == before(in_jax(call))


@pytest.mark.parametrize("side", [in_torch, in_jax])
def test_the_factor_that_is_summed_over_later(side: Callable[[Call], Uses]) -> None:
    """An attention's keys, whichever factor comes first; without a softmax of anything nothing is."""

    def summed(call: Call) -> str:
        uses = side(call)
        return " ".join(name for name in "abc" for mask in uses.summed.values() if mask & uses.bits([name]))

    assert summed(lambda m, x: ((x @ m.a) @ (x @ m.b).T) @ (x @ m.c)) == "b"
    assert summed(lambda m, x: ((x @ m.b) @ (x @ m.a).T).T.T @ (x @ m.c)) == "a"
    assert summed(lambda m, x: (x @ m.a) @ (x @ m.b).T) == ""


def test_what_is_bent_before_it_is_multiplied() -> None:
    def bent(uses: Uses) -> list[str]:
        return [" ".join(name for name in "abc" if mask & uses.bits([name])) for mask in uses.bent]

    assert bent(in_torch(lambda m, x: functional.silu(x @ m.a) * (x @ m.b))) == ["a", "b"]
    assert bent(in_jax(lambda m, x: (x @ m.b) * jax.nn.silu(x @ m.a))) == ["a", "b"]
    assert bent(in_torch(lambda m, x: (x @ m.a) * 3.0 * (x @ m.b))) == bent(in_jax(lambda m, x: (x @ m.a) * (x @ m.b))) == ["", ""]


# Dims


def test_dims_are_digits() -> None:
    dims = dims_of((4, 6))
    assert reshaped(dims, (2, 12)) == ((Atom(0, 2, 2),), (Atom(0, 1, 2), Atom(1, 1, 6)))
    assert reshaped(dims, (3, 8)) is None and reshaped(dims, (4, 5)) is None
    assert resized(dims, (4, 2)) == ((Atom(0, 1, 4),), (Atom(1, 1, 2),))
    assert resized(dims, (6,)) is None
    assert spread(dims_of((1, 6)), (0, 2), (5, 2, 6)) == ((Atom("", 1, 5),), (Atom("", 1, 2),), (Atom(1, 1, 6),))
