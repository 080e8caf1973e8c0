"""Every layer rule, by what layers compute: a torch layer, and the same layer of each JAX library with converted arrays.

The bound on a difference is not guessed. A torch layer's float32 results are off from its float64 ones by some noise, and two sound
implementations may each be that far off, in directions of their own. Where the noise of a few numbers happens to be less than half a unit
in the last place of the largest result, that is taken. The mildest fault is far beyond: in every array, some elements are changed, and the
results must move by a hundred times the bound.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("flax")
pytest.importorskip("equinox")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from porting_layers import CASES  # noqa: E402
from porting_targets import Case, Target, shaken  # noqa: E402

from shardconv.porting import equinox, linen, nnx  # noqa: E402
from shardconv.porting.folding import computed  # noqa: E402
from shardconv.porting.landing import gaps, landed  # noqa: E402
from shardconv.porting.layers import layers_of  # noqa: E402
from shardconv.porting.moves import Bound  # noqa: E402
from shardconv.porting.rules import choices, required_zeros  # noqa: E402
from shardconv.porting.trees import Tree, opened  # noqa: E402

TABLES = {"linen": linen.TABLE, "nnx": nnx.TABLE, "equinox": equinox.TABLE}
FACTOR = 4.0
SEEN = 100.0  # times the bound
HALF_A_PLACE = 2.0**-24
Array = np.ndarray[Any, Any]
ROWS = [(name, target) for name, case in CASES.items() for target in case.targets]


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Flax and Equinox broadcast, and matrices are multiplied in float32."""
    with jax.default_matmul_precision("highest"), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def torch_layer(case: Case) -> tuple[Any, dict[str, Array]]:
    torch.manual_seed(0)
    module = case.adjust(shaken(case.module()))
    return module, {name: value.detach().numpy() for name, value in module.state_dict().items()}


def in_torch(case: Case, module: Any, dtype: Any) -> Array:
    given = [torch.from_numpy(x).to(dtype) if x.dtype == np.float32 else torch.from_numpy(x).long() for x in case.inputs]
    with torch.inference_mode():
        return np.asarray(case.output(module.to(dtype)(*given)).double().numpy())


def in_jax(target: Target, model: Any, case: Case) -> Array:
    return np.asarray(target.call(model, *map(jnp.asarray, case.inputs)), np.float64)


def moves_for(case: Case, library: str, target: Target, module: Any, tensors: Mapping[str, Array], tree: Tree) -> list[Bound]:
    kinds = {"": tuple(kind.__name__ for kind in type(module).__mro__)}
    (views,) = layers_of(tensors, kinds).values()
    assert views[0].name == case.layer
    prefix = f"{target.at}." if target.at else ""
    arrays = {name.removeprefix(prefix): name for name in tree.leaves}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    (choice,) = choices(TABLES[library.split()[0]], views, arrays, shapes, tree.shapes)
    for expression, zero in required_zeros(choice.rule, choice.layer):
        assert not np.split(computed(expression, tensors, ()), 3)[zero.part].any()
    assert gaps(choice.moves, tree.shapes) == {}
    return choice.moves


@pytest.mark.parametrize(("name", "library"), ROWS, ids=[f"{name}-{library}" for name, library in ROWS])
def test_a_layer_computes_what_torch_does(name: str, library: str) -> None:
    case = CASES[name]
    target = case.targets[library]()
    module, tensors = torch_layer(case)
    tree = opened(target.model)
    arrays = landed(moves_for(case, library, target, module, tensors, tree), tensors, tree.dtypes)
    found = in_jax(target, tree.rebuilt(arrays), case)

    expected, truth = in_torch(case, module, torch.float32), in_torch(case, module, torch.float64)
    bound = FACTOR * max(abs(expected - truth).max(), HALF_A_PLACE * abs(truth).max())
    assert found.shape == expected.shape
    assert abs(found - expected).max() <= bound

    random = np.random.default_rng(0)
    for changed, array in arrays.items():
        if changed.endswith(case.unseen):
            continue
        other = array + random.uniform(0.5, 1.0, array.shape).astype(array.dtype)
        moved = in_jax(target, tree.copied({**arrays, changed: other}), case)
        assert abs(moved - found).max() > SEEN * bound, changed
