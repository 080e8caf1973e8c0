"""Layers told apart by what two followed runs have in common, and left open where they have it in common with others too."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("flax")
pytest.importorskip("equinox")

import equinox as eqx  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import torch_models  # noqa: E402
from flax import linen, nnx  # noqa: E402
from porting_flows import (  # noqa: E402
    KEY,
    TOKENS,
    WIDE,
    EqxBlock,
    EqxScan,
    LinenBlocks,
    LinenScan,
    NnxBlock,
    NnxScan,
    TorchBlock,
    inputs,
    shaken,
)
from test_porting_examples import resnet  # noqa: E402

import shardconv  # noqa: E402
from shardconv.errors import InputError  # noqa: E402
from shardconv.porting.agreement import same_outputs  # noqa: E402
from shardconv.porting.flow import Flow  # noqa: E402
from shardconv.porting.matching import Proposal, proposed  # noqa: E402
from shardconv.porting.sources import weights_of  # noqa: E402
from shardconv.porting.trees import opened  # noqa: E402

nn = torch.nn
Array = np.ndarray[Any, Any]


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with jax.default_matmul_precision("highest"), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def by_flow(module: Any, x: Any, model: Any, call: Callable[[Any], Any]) -> Proposal:
    """What is proposed without running anything but to follow it."""
    tree = opened(model)
    flow = same_outputs(module, [x], call).flow(tree)
    assert isinstance(flow, Flow)
    return proposed(weights_of(module), tree, flow=flow)


def open_places(proposal: Proposal) -> dict[str, tuple[str, ...]]:
    return {one.layer.name: one.places for one in proposal.open}


# A transformer's blocks: seven matrices of one shape each, and two norms


def blocks(count: int) -> Any:
    return shaken(nn.Sequential(*(TorchBlock() for _ in range(count))))


IN_LINEN = {"a": "Dense_2", "b": "Dense_1", "c": "Dense_0", "d": "Dense_3", "e": "Dense_6", "f": "Dense_5", "g": "Dense_4"}
IN_LINEN |= {"x": "LayerNorm_0", "y": "LayerNorm_1"}
IN_LISTS = {"a": "parts.6", "b": "parts.5", "c": "parts.4", "d": "parts.3", "e": "parts.0", "f": "parts.1", "g": "parts.2"}
IN_LISTS |= {"x": "scales.1", "y": "scales.0"}


def test_linens_blocks_are_settled_by_their_flow() -> None:
    x, y = inputs(2, TOKENS, WIDE)
    model = LinenBlocks()
    found = by_flow(blocks(2), x, jax.eval_shape(model.init, KEY, y), lambda variables: model.apply(variables, y))
    assert found.places == {f"{n}.{there}": f"LinenBlock_{n}.{here}" for n in range(2) for there, here in IN_LINEN.items()}


@pytest.mark.parametrize("library", ["nnx", "equinox"])
def test_a_block_is_settled_by_its_flow(library: str) -> None:
    x, y = inputs(2, TOKENS, WIDE)
    model = nnx.eval_shape(lambda: NnxBlock(nnx.Rngs(0))) if library == "nnx" else eqx.filter_eval_shape(EqxBlock, KEY)
    found = by_flow(shaken(TorchBlock()), x, model, lambda model: (model if library == "nnx" else jax.vmap(model))(y))
    assert found.places == IN_LISTS


@pytest.mark.parametrize("library", ["nnx", "equinox"])
def test_scanned_modules_are_settled_by_their_flow(library: str) -> None:
    x, y = inputs(2, TOKENS, WIDE)
    if library == "nnx":
        model = nnx.eval_shape(lambda: NnxScan(nnx.Rngs(0)))
        found = by_flow(blocks(3), x, model, lambda model: nnx.jit(lambda model, y: model(y))(model, y))
    else:
        model = eqx.filter_eval_shape(EqxScan, KEY)
        found = by_flow(blocks(3), x, model, lambda model: jax.vmap(eqx.filter_jit(model))(y))
    assert found.places == {f"{n}.{there}": f"stack.{here}" for n in range(3) for there, here in IN_LISTS.items()}


def test_scanned_blocks_are_settled_by_their_flow() -> None:
    x, y = inputs(2, TOKENS, WIDE)
    module, model = blocks(3), LinenScan()
    shapes = jax.eval_shape(model.init, KEY, y)
    runs = []

    def call(variables: Any) -> Any:
        runs.append(isinstance(jax.tree.leaves(variables)[0], jax.core.Tracer))
        return model.apply(variables, y)

    found = by_flow(module, x, shapes, call)
    assert found.places == {f"{n}.{there}": f"stack.{here}" for n in range(3) for there, here in IN_LINEN.items()}
    text = [str(move.move) for move in found.moves if move.move.target == "stack.Dense_0.kernel"]
    assert text == ["{layers}.c.weight: o i -> layers i o"]
    runs.clear()
    variables = shardconv.convert_module(module, shapes, agrees=same_outputs(module, [x], call))
    assert runs == [True, False]  # followed once, and confirmed once
    assert np.array_equal(variables["params"]["stack"]["Dense_0"]["kernel"][1], module[1].c.weight.detach().numpy().T)


class Mute(nn.Module):
    """A block of which queries and keys, gate and up cannot be told apart: neither softmax nor activation."""

    def __init__(self) -> None:
        super().__init__()
        for name in "abcd":
            setattr(self, name, nn.Linear(WIDE, WIDE))

    def forward(self, x: Any) -> Any:
        return self.d(self.a(x) + self.b(x) * self.c(x))


class LinenMute(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        last, first, up, gate = (linen.Dense(WIDE) for _ in range(4))
        return last(first(x) + gate(x) * up(x))


def test_parallel_branches_are_not_settled_by_the_order_in_which_they_run() -> None:
    """The last layer is; of the three before it, none. Running the model tells the one that is added, and not one factor from the other."""
    x, y = inputs(3, WIDE)
    module, model = shaken(Mute()), LinenMute()
    shapes = jax.eval_shape(model.init, KEY, y)
    found = by_flow(module, x, shapes, lambda variables: model.apply(variables, y))
    some = ("Dense_0", "Dense_1", "Dense_2")
    (last,) = found.places
    assert last == "d" and set(open_places(found)) == set("abc")
    assert all(len(set(places)) == 3 and found.places["d"] not in places for places in open_places(found).values()), some
    with pytest.raises(InputError, match="2 of 4 layers are open") as caught:
        shardconv.convert_module(module, shapes, agrees=same_outputs(module, [x], lambda variables: model.apply(variables, y)))
    said = "fits Dense_2, Dense_3, and neither its name nor the flow of both models says which"
    assert f"open: b (Linear: weight (8, 8), bias (8)) {said}" in str(caught.value)


# A chain of squares


class Chain(linen.Module):
    """`Dense_0` is the last: it is made first."""

    depth: int

    @linen.compact
    def __call__(self, x: Any) -> Any:
        for layer in reversed([linen.Dense(WIDE, name=f"Dense_{n}") for n in range(self.depth)]):
            x = linen.relu(layer(x))
        return x


def chain(depth: int) -> Any:
    return shaken(nn.Sequential(*(part for _ in range(depth) for part in (nn.Linear(WIDE, WIDE), nn.ReLU()))))


def test_a_chain_of_squares_is_settled_by_what_comes_before_what() -> None:
    """Of nine layers there are 362880 orders, and that of the names is wrong."""
    x, y = inputs(3, WIDE)
    module, model = chain(9), Chain(9)
    shapes = jax.eval_shape(model.init, KEY, y)
    agrees = same_outputs(module, [x], lambda variables: model.apply(variables, y))
    variables = shardconv.convert_module(module, shapes, agrees=agrees)
    assert agrees(variables)
    assert np.array_equal(variables["params"]["Dense_8"]["kernel"], module[0].weight.detach().numpy().T)
    with pytest.raises(InputError, match="9 of 9 layers are open"):
        shardconv.convert_module(module, shapes, agrees=lambda model: agrees(model))


def test_a_chain_that_jax_cannot_trace_is_run() -> None:
    x, _ = inputs(3, WIDE)
    module, shapes = chain(3), jax.eval_shape(Chain(3).init, KEY, jnp.zeros((1, WIDE)))

    def in_numpy(variables: Any) -> Array:
        y = x.numpy()
        for n in (2, 1, 0):
            layer = variables["params"][f"Dense_{n}"]
            y = np.maximum(y @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"]), 0)
        return y

    agrees = same_outputs(module, [x], in_numpy)
    assert agrees(shardconv.convert_module(module, shapes, agrees=agrees))
    other = {name: 2.0 * tensor for name, tensor in module.state_dict().items()}
    why = agrees.flow(opened(shapes))
    assert isinstance(why, str) and why.startswith("TracerArrayConversionError: The numpy")
    with pytest.raises(InputError) as caught:
        shardconv.convert_module(other, shapes, agrees=agrees)
    assert f"the call could not be followed: {why}\n      compute in it with jax.numpy alone" in str(caught.value)


@pytest.mark.parametrize("depth", [3, 9])
def test_flow_that_the_model_does_not_confirm_is_not_taken(depth: int) -> None:
    """The call that is followed is not the one that is compared: the flow settles it wrongly, and running the model finds that out. Few
    layers are then tried in every order."""
    x, y = inputs(3, WIDE)
    module, shapes = chain(depth), jax.eval_shape(Chain(depth).init, KEY, y)

    def two_faced(variables: Any) -> Any:
        if isinstance(jax.tree.leaves(variables)[0], jax.core.Tracer):
            return Chain(depth).apply(variables, y)
        params = {f"Dense_{n}": variables["params"][f"Dense_{(n + 1) % depth}"] for n in range(depth)}
        return Chain(depth).apply({"params": params}, y)

    agrees = same_outputs(module, [x], two_faced)
    if depth == 3:
        assert agrees(shardconv.convert_module(module, shapes, agrees=agrees))
    else:
        with pytest.raises(InputError, match="9 of 9 layers are open"):
            shardconv.convert_module(module, shapes, agrees=agrees)


def test_orders_that_differ_say_nothing() -> None:
    """The port has its last two layers side by side: a chain is no such thing, and nothing is taken from either."""
    x, y = inputs(3, WIDE)

    def beside(variables: Any) -> Any:
        p = variables["params"]
        z = y @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]
        return z @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"] + z @ p["Dense_2"]["kernel"] + p["Dense_2"]["bias"]

    found = by_flow(chain(3), x, jax.eval_shape(Chain(3).init, KEY, y), beside)
    assert found.places == {}
    assert all(len(places) == 3 for places in open_places(found).values())


# Square matrices that lie one way or the other


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDE, WIDE, bias=False), nn.Linear(WIDE, WIDE, bias=False)

    def forward(self, x: Any) -> Any:
        return self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("down", [False, True])
def test_a_square_is_turned_as_both_sides_contract_it(up: bool, down: bool) -> None:
    x, y = inputs(3, WIDE)
    module, tree = shaken(Pair()), {name: np.zeros((WIDE, WIDE), np.float32) for name in ("up", "down")}

    def call(tree: Any) -> Any:
        z = jax.nn.relu(y @ tree["up"].T if up else y @ tree["up"])
        return jnp.einsum("oi,ni->no", tree["down"], z) if down else jnp.einsum("io,ni->no", tree["down"], z)

    found = by_flow(module, x, tree, call)
    forms = {move.move.target: f"{move.move.dims} -> {move.move.to}" for move in found.moves}
    assert forms == {"up": f"o i -> {'o i' if up else 'i o'}", "down": f"o i -> {'o i' if down else 'i o'}"}
    both = by_flow(module, x, tree, lambda tree: call(tree) + y @ tree["up"] + y @ tree["up"].T)
    assert [one.layer.name for one in both.open] == ["up"]  # contracted both ways: either may be meant


def test_a_kernel_that_is_used_the_other_way_round_is_not_filled_as_usual() -> None:
    """Names and shapes say that it is a kernel; the call multiplies it from the left, and the layer rule would be wrong."""
    x, y = inputs(3, WIDE)
    module = nn.Sequential(shaken(nn.Linear(WIDE, WIDE, bias=False)))
    tree = {"params": {"0": {"kernel": np.zeros((WIDE, WIDE), np.float32)}}}
    right = same_outputs(module, [x], lambda tree: y @ tree["params"]["0"]["kernel"])
    wrong = same_outputs(module, [x], lambda tree: y @ tree["params"]["0"]["kernel"].T)
    assert right(shardconv.convert_module(module, tree, agrees=right))
    with pytest.raises(InputError, match="1 of 1 layers are open") as caught:
        shardconv.convert_module(module, tree, agrees=wrong)
    assert "0 (Linear: weight (8, 8)) fits 0 by its shapes, but is contracted along other axes than that is" in str(caught.value)


def test_a_table_that_is_tied_on_one_side_only() -> None:
    """In torch one matrix is looked up and multiplied with, in the model there are two of them."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(WIDE, WIDE), nn.Linear(WIDE, WIDE, bias=False)
            self.head.weight = self.table.weight

        def forward(self, rows: Any) -> Any:
            return self.head(self.table(rows))

    class Untied(linen.Module):
        @linen.compact
        def __call__(self, rows: Any) -> Any:
            return linen.Dense(WIDE, use_bias=False)(linen.Embed(WIDE, WIDE)(rows))

    rows = np.array([[3, 1], [0, 7]])
    shapes = jax.eval_shape(Untied().init, KEY, rows)
    found = by_flow(shaken(Tied()), torch.from_numpy(rows), shapes, lambda variables: Untied().apply(variables, jnp.asarray(rows)))
    assert found.places == {"table": "Embed_0", "head": "Dense_0"}


def test_to_be_followed_leaves_a_module_as_it_was() -> None:
    module, (x, y) = nn.Sequential(nn.BatchNorm1d(WIDE)), inputs(3, WIDE)
    agrees = same_outputs(module, [x], lambda tree: y * tree["0"]["weight"])
    was = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert isinstance(agrees.flow(opened({"0": {"weight": np.zeros(WIDE)}})), Flow)
    assert module.training and all(torch.equal(tensor, was[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("turned", [False, True])
def test_a_transposed_convolutions_form_shows_in_what_is_contracted(turned: bool) -> None:
    x, _ = inputs(1, 3, 4, 4)
    module = nn.Sequential(shaken(nn.ConvTranspose2d(3, 3, 2, bias=False)))
    layer = linen.ConvTranspose(3, (2, 2), padding="VALID", use_bias=False, transpose_kernel=turned)
    image = jnp.asarray(x.numpy().transpose(0, 2, 3, 1))
    model = {"params": {"0": {"kernel": np.zeros((2, 2, 3, 3), np.float32)}}}
    found = by_flow(module, x, model, lambda tree: layer.apply({"params": tree["params"]["0"]}, image).transpose(0, 3, 1, 2))
    (move,) = found.moves
    assert str(move.move).partition(":")[0] == ("0.weight" if turned else "flip(0.weight)")


# A whole model


def test_a_resnet_without_any_names_is_settled_by_its_flow() -> None:
    """As in the example, its modules called m0, m1, ... in no order: nearly all of its layers have a twin of the same shape."""
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch_models.shaken(torch_models.ResNet((2, 3, 1, 1), 8, 10))

        def forward(self, x: Any) -> Any:
            return self.net(x)["logits"]

    x, y = inputs(1, 3, 32, 32)
    net, last = resnet.ResNet((2, 3, 1, 1), 8, 10), jnp.moveaxis(y, 1, -1)
    shapes = jax.eval_shape(net.init, KEY, last)
    paths, structure = jax.tree.flatten_with_path(shapes)
    modules = np.random.default_rng(0).permutation(sorted({jax.tree_util.keystr(path[1:-1]) for path, _ in paths}))
    number = {str(module): f"m{place}" for place, module in enumerate(modules)}
    where = [(path[0].key, number[jax.tree_util.keystr(path[1:-1])], path[-1].key) for path, _ in paths]
    anonymous: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for (collection, module, name), (_, leaf) in zip(where, paths, strict=True):
        anonymous[collection].setdefault(module, {})[name] = leaf

    forward = jax.jit(net.apply)

    def call(variables: Any) -> Any:
        leaves = [variables[collection][module][name] for collection, module, name in where]
        return forward(jax.tree.unflatten(structure, leaves), last)["logits"]

    module = Logits()
    agrees = same_outputs(module, [x], call)
    tree = opened(anonymous)
    assert len(proposed(weights_of(module), tree).open) > 20
    found = by_flow(module, x, anonymous, call)
    assert not found.open and len(found.places) == 53
    assert agrees(shardconv.convert_module(module, anonymous, agrees=agrees))
