"""Models that nobody would write: random programs of layers that are all of one shape, of which nothing may be settled wrongly."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("flax")
pytest.importorskip("equinox")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from porting_flows import TOKENS, WIDE, inputs, shaken  # noqa: E402

from shardconv.porting.agreement import same_outputs  # noqa: E402
from shardconv.porting.flow import Flow  # noqa: E402
from shardconv.porting.matching import proposed  # noqa: E402
from shardconv.porting.sources import weights_of  # noqa: E402
from shardconv.porting.trees import opened  # noqa: E402

nn = torch.nn
Step = tuple[str, tuple[int, ...]]  # what is done, and the steps whose results it has
ARITY = {"layer": 1, "add": 2, "mul": 2, "silu": 1, "attend": 3}


def program(seed: int) -> list[Step]:
    """Six to fifteen steps, and sums of all results that nothing else has."""
    random = np.random.default_rng(seed)
    steps: list[Step] = [("x", ())]
    for _ in range(int(random.integers(6, 16))):
        name = str(random.choice(list(ARITY), p=[0.5, 0.15, 0.1, 0.15, 0.1]))
        steps.append((name, tuple(int(n) for n in random.integers(max(0, len(steps) - 5), len(steps), ARITY[name]))))
    used = {n for _, inner in steps for n in inner}
    for n in range(len(steps)):
        if n not in used and n + 1 < len(steps):
            steps.append(("add", (n, len(steps) - 1)))
    return steps


class Programmed(nn.Module):
    """In torch, from the first step to the last."""

    def __init__(self, steps: Sequence[Step]) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleDict({str(n): nn.Linear(WIDE, WIDE) for n, (name, _) in enumerate(steps) if name == "layer"})

    def forward(self, x: Any) -> Any:
        found: list[Any] = []
        for n, (name, inner) in enumerate(self.steps):
            given = [found[place] for place in inner]
            if name == "layer":
                found.append(self.layers[str(n)](*given))
            elif name == "attend":
                found.append(nn.functional.scaled_dot_product_attention(*given))
            else:
                found.append({"x": lambda: x, "add": torch.add, "mul": torch.mul, "silu": nn.functional.silu}[name](*given))
        return found[-1]


def in_jax(steps: Sequence[Step], layers: Mapping[int, Any], n: int, known: dict[int, Any]) -> Any:
    """A step in JAX, from the last to the first, with its factors and terms exchanged."""
    if n not in known:
        name, inner = steps[n]
        given = [in_jax(steps, layers, place, known) for place in (inner[::-1] if name in ("add", "mul") else inner)]
        if name == "layer":
            known[n] = layers[n]["bias"] + jnp.einsum("oi,no->ni", layers[n]["kernel"], given[0])
        elif name == "attend":
            q, k, v = given
            known[n] = jnp.einsum("kc,qk->qc", v, jax.nn.softmax(jnp.einsum("kc,qc->qk", k, q) / WIDE**0.5))
        else:
            known[n] = {"add": jnp.add, "mul": jnp.multiply, "silu": jax.nn.silu}[name](*given)
    return known[n]


def settled_in(seed: int) -> tuple[int, int]:
    """How many layers of a program are settled, all of them rightly, and how many there are."""
    steps = program(seed)
    module = shaken(Programmed(steps))
    numbers = np.random.default_rng(seed).permutation(len(module.layers))
    truth = {int(layer): "abcdefghijklmnopqrst"[n] for layer, n in zip(module.layers, numbers, strict=True)}
    tree = {"params": {name: {"kernel": np.zeros((WIDE, WIDE)), "bias": np.zeros(WIDE)} for name in sorted(truth.values())}}
    x, y = inputs(TOKENS, WIDE)

    def call(tree: Any) -> Any:
        return in_jax(steps, {n: tree["params"][name] for n, name in truth.items()}, len(steps) - 1, {0: y})

    flow = same_outputs(module, [x], call).flow(opened(tree))
    assert isinstance(flow, Flow), flow
    found = proposed(weights_of(module), opened(tree), flow=flow)
    assert found.places == {layer: truth[int(layer.removeprefix("layers."))] for layer in found.places}, (seed, steps)
    return len(found.places), len(truth)


@pytest.mark.parametrize("seeds", [range(12), *(range(n, n + 100) for n in range(100, 500, 100))], ids=str)
def test_nothing_is_settled_wrongly(seeds: range) -> None:
    """And most is settled: what is not has a twin that does the same."""
    with jax.default_matmul_precision("highest"), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        settled, layers = np.sum([settled_in(seed) for seed in seeds], axis=0)
    assert 0.6 * layers < settled < layers
