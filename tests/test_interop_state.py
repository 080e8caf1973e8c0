"""What a traced module has beside its weights: buffers that it writes, and random numbers."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardconv.errors import ConfigError
from shardconv.interop import j2t, t2j, torch_in_jax, weightless

torch = pytest.importorskip("torch")
if find_spec("torchax") is None:
    pytest.skip("torchax is not installed", allow_module_level=True)
nn = torch.nn

QUICK = {"xla_backend_optimization_level": 0}  # XLA takes longer over these models than they run
CLOSE = 1e-6


def state_of(module: Any) -> dict[str, jax.Array]:
    return {name: t2j(value) for name, value in module.state_dict().items()}


def inputs(*shape: int) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 2 + 1


# Buffers

NORMS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(3), (6, 3)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3, momentum=0.3), (2, 3, 4, 2)),
    "BatchNorm3d, not affine": (lambda: nn.BatchNorm3d(3, affine=False), (2, 3, 2, 2, 3)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(3, track_running_stats=True), (2, 3, 4, 2)),
}


@pytest.mark.parametrize("name", NORMS)
def test_statistics_are_kept_as_torch_keeps_them(name: str) -> None:
    module, x = NORMS[name][0](), inputs(*NORMS[name][1])
    step = jax.jit(lambda state, x: t2j(module)(x, state_dict=state, return_state_dict=True), compiler_options=QUICK)
    state = state_of(module)
    for batch in (x, 2 * x.flip(-1) - 3):
        before = {name: value.clone() for name, value in module.state_dict().items()}
        found, state = step(state, t2j(batch))
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
        np.testing.assert_allclose(found, module(batch).detach(), atol=4 * CLOSE)
        assert set(state) == set(module.state_dict())
        for key, value in module.state_dict().items():
            np.testing.assert_allclose(state[key], value, atol=CLOSE, err_msg=key)


def test_in_eval_nothing_is_written() -> None:
    module, x = nn.BatchNorm1d(3).eval(), inputs(6, 3)
    state = state_of(module)
    found, after = torch_in_jax(module)(state, t2j(x), return_state_dict=True)
    np.testing.assert_allclose(found, module(x).detach(), atol=CLOSE)
    assert all(np.array_equal(after[name], value) for name, value in state.items())


def test_gradients_go_through_a_batch_and_not_through_what_is_kept() -> None:
    module, x = nn.BatchNorm1d(3), inputs(6, 3)
    call, state = t2j(module), state_of(module)
    buffers = {name: state[name] for name, _ in module.named_buffers()}

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return (call(x, state_dict={**params, **buffers}) ** 3).sum()

    slopes, there = jax.grad(loss, (0, 1))({"weight": state["weight"], "bias": state["bias"]}, t2j(x))
    given = x.clone().requires_grad_()
    (module(given) ** 3).sum().backward()
    np.testing.assert_allclose(there, given.grad, atol=2e-5)
    for name, weight in module.named_parameters():
        np.testing.assert_allclose(slopes[name], weight.grad, rtol=1e-5, atol=2e-5)


class Counting(nn.Module):
    """Buffers written in every way; one is no part of the state, and a weight has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False)
        self.second = self.first
        self.register_buffer("calls", torch.zeros((), dtype=torch.int32))
        self.register_buffer("total", torch.zeros(2))
        self.register_buffer("last", torch.zeros(2), persistent=False)

    def forward(self, x: Any) -> Any:
        self.calls += 1
        self.total = self.total + x.sum(0)
        self.last[1:].copy_(x[0, 1:])
        return self.second(self.first(x)) + self.last


def test_what_is_written_comes_back_by_every_name() -> None:
    with weightless():
        module = Counting()
    weight, x = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[1.0, 5.0]])
    params = {"second.weight": weight, "calls": jnp.int32(6), "total": jnp.ones(2)}
    found, after = torch_in_jax(module)(params, x, return_state_dict=True)
    assert found.tolist() == (x @ weight.T @ weight.T + jnp.array([[0.0, 5.0]])).tolist()
    assert set(after) == {"first.weight", "second.weight", "calls", "total"}
    assert after["first.weight"].tolist() == after["second.weight"].tolist() == weight.tolist()
    assert after["calls"] == 7 and after["total"].tolist() == [2.0, 6.0]
    assert int(module.calls) == 0 and module.total.tolist() == [0.0, 0.0] == module.last.tolist()


# Random numbers

DRAWN: dict[str, Callable[[], Any]] = {
    "rand": lambda: torch.rand(5, 7),
    "rand, half": lambda: torch.rand((3,), dtype=torch.float16, device="cpu"),
    "randn": lambda: torch.randn(64),
    "randperm": lambda: torch.randperm(40),
    "randint": lambda: torch.randint(3, 9, (40,)),
    "rand_like": lambda: torch.rand_like(torch.rand(3)),
    "dropout": lambda: nn.functional.dropout(torch.rand(64)),
}


@pytest.mark.parametrize("name", DRAWN)
def test_what_a_function_draws_comes_from_the_key(name: str) -> None:
    function = DRAWN[name]
    call = jax.jit(lambda key: t2j(function)(rng=key))
    one, again, other = call(jax.random.key(1)), call(jax.random.PRNGKey(1)), call(jax.random.key(2))
    expected = function()
    assert one.shape == expected.shape and j2t(one).dtype == (torch.int32 if "int" in name or "perm" in name else expected.dtype)
    assert (one == again).all() and (one != other).any()
    with pytest.raises(ConfigError, match="a pure function has none of its own"):
        t2j(function)()


@pytest.mark.parametrize("function", [lambda: torch.empty(3).normal_(), lambda: torch.bernoulli(torch.ones(9) / 2)])
def test_torchs_own_generators_are_refused_and_left_as_they_are(function: Callable[[], Any]) -> None:
    before = torch.get_rng_state()
    with pytest.raises(ConfigError) as caught:
        t2j(function)(rng=jax.random.key(0))
    assert str(caught.value) == (
        "the module draws random numbers (1 problem):\n"
        "  some come from a generator of torch's own\n"
        "      draw them with torch.rand, randn or randint, or like one of the inputs: torch.rand_like(x)"
    )
    assert torch.equal(torch.get_rng_state(), before)
