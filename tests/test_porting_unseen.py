"""Arrays that no comparison of outputs shows, found by measurement: in users' own models, whole arrays and parts of them."""

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_floors import ROOT

pytest.importorskip("flax")
pytest.importorskip("equinox")

import equinox as eqx
from flax import linen, nnx

from shardconv.porting.trees import opened
from shardconv.porting.unseen import insensitive, unseen

sys.path += [str(ROOT), str(ROOT / "examples")]

from examples import dinov3_equinox, dinov3_nnx, dinov3_rope

KEY = jax.random.key(0)
WHOLE = ((),)
Calls = list[None]


@pytest.fixture(autouse=True)
def exact() -> Any:
    with jax.default_matmul_precision("highest"), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def counted(call: Callable[..., Any]) -> tuple[Callable[..., Any], Calls]:
    """A call, and how often it was made."""
    calls: Calls = []

    def found(*given: Any) -> Any:
        calls.append(None)
        return call(*given)

    return found, calls


# A vision transformer


SIZES = dinov3_rope.Sizes(embed=32, mlp=48, layers=1, heads=2, patch=4)
MASKED = np.arange(2 * 6).reshape(2, 6) % 5 == 2


def jitted(library: str, model: Any, images: jax.Array) -> Callable[[Any, jax.Array], Any]:
    """The model on images with masked patches, compiled once."""
    if library == "nnx":
        structure = nnx.graphdef(model)
        run = jax.jit(lambda state, masked: jax.vmap(nnx.merge(structure, state))(images, masked))
        return lambda model, masked: run(nnx.state(model), masked)
    rest = eqx.filter(model, eqx.is_array, inverse=True)
    ran = jax.jit(lambda arrays, masked: jax.vmap(eqx.combine(arrays, rest))(images, masked))
    return lambda model, masked: ran(eqx.filter(model, eqx.is_array), masked)


@pytest.mark.parametrize("library", ["nnx", "equinox"])
def test_a_mask_token_is_unseen_where_nothing_is_masked_and_seen_where_something_is(library: str) -> None:
    if library == "nnx":
        model: Any = nnx.eval_shape(lambda: dinov3_nnx.DINOv3(SIZES, nnx.Rngs(0)))
        model = opened(model).rebuilt({name: np.asarray(normal(*leaf.shape)) / 4 for name, leaf in opened(model).leaves.items()})
        images = normal(2, 12, 8, 3)
    else:
        model = dinov3_equinox.DINOv3(SIZES, KEY)
        images = normal(2, 3, 12, 8)
    call, calls = counted(jitted(library, model, images))
    assert unseen(lambda model: call(model, jnp.zeros((2, 6), bool)), model) == {"mask_token": WHOLE}
    assert 4 <= len(calls) <= 8 < len(opened(model).leaves) // 2
    assert unseen(lambda model: call(model, jnp.asarray(MASKED)), model) == {}


# A key's bias


class NnxAttention(nnx.Module):
    def __init__(self, turned: bool) -> None:
        self.turned = turned
        self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=16, qkv_features=16, decode=False, rngs=nnx.Rngs(0))
        for part in (self.attention.query, self.attention.key, self.attention.value):
            part.bias.set_value(normal(2, 8))

    def __call__(self, x: jax.Array) -> jax.Array:
        attention = self.attention
        query, key, value = attention.query(x), attention.key(x), attention.value(x)
        if self.turned:
            angles = jnp.tile(jnp.arange(x.shape[1], dtype=jnp.float32)[:, None], 8)
            query, key = (jax.vmap(dinov3_rope.rotated, (0, None))(heads, angles) for heads in (query, key))
        return attention.out(nnx.dot_product_attention(query, key, value))


@pytest.mark.parametrize("turned", [False, True])
def test_a_keys_bias_is_unseen_where_nothing_rotates_it(turned: bool) -> None:
    x = normal(3, 7, 16)
    found = unseen(lambda model: model(x), NnxAttention(turned))
    assert found == ({} if turned else {"attention.key.bias": WHOLE})


def test_a_keys_bias_of_equinox() -> None:
    attention = eqx.nn.MultiheadAttention(2, 16, use_query_bias=True, use_key_bias=True, use_value_bias=True, use_output_bias=True, key=KEY)
    x = normal(7, 16)
    assert unseen(lambda model: model(x, x, x), attention) == {"key_proj.bias": WHOLE}


def test_the_keys_part_of_a_bias_of_all_three_is_given_by_its_elements() -> None:
    arrays = {"qkv.kernel": normal(8, 24), "qkv.bias": normal(24, seed=1), "out.kernel": normal(8, 8, seed=2)}
    x = normal(5, 8, seed=3)

    def call(arrays: Any) -> jax.Array:
        query, key, value = jnp.split(x @ arrays["qkv.kernel"] + arrays["qkv.bias"], 3, axis=-1)
        return jax.nn.softmax(query @ key.T) @ value @ arrays["out.kernel"]

    assert unseen(call, arrays) == {"qkv.bias": tuple((place,) for place in range(8, 16))}


# Experts, rows, and what no gradient tells


def mixture(x: jax.Array) -> Callable[[Any], jax.Array]:
    """Two layers of four experts each, one for each token."""

    def call(arrays: Any) -> jax.Array:
        y = x
        for layer in range(2):
            scores = jax.nn.softmax(y @ arrays["router"][layer])
            shares = scores * jax.nn.one_hot(scores.argmax(-1), 4)
            y = y + jnp.einsum("te,td,edf->tf", shares, y, arrays["experts"][layer])
        return y

    return call


def test_unrouted_experts_are_named_by_layer_and_number() -> None:
    arrays = {"router": normal(2, 8, 4), "experts": normal(2, 4, 8, 8, seed=1) * 0.1}
    x = normal(3, 8, seed=2)
    y, used = x, set()
    for layer in range(2):
        chosen = (y @ arrays["router"][layer]).argmax(-1).tolist()
        used |= {(layer, expert) for expert in chosen}
        shares = jax.nn.softmax(y @ arrays["router"][layer])
        y = y + jnp.stack([shares[token, expert] * (y[token] @ arrays["experts"][layer, expert]) for token, expert in enumerate(chosen)])
    left = tuple((layer, expert) for layer in range(2) for expert in range(4) if (layer, expert) not in used)
    assert 2 <= len(left) < 8
    assert unseen(mixture(x), arrays) == {"experts": left}
    assert unseen(mixture(normal(40, 8, seed=2)), arrays) == {}


def test_over_several_inputs_only_what_none_of_them_shows_is_unseen() -> None:
    arrays = {"embed": normal(6, 4), "kernel": normal(4, 4, seed=1)}

    def call(arrays: Any, tokens: jax.Array) -> jax.Array:
        return arrays["embed"][tokens] @ arrays["kernel"]

    assert insensitive(call, arrays, [jnp.array([0, 3]), jnp.array([3, 5])]) == {"embed": ((1,), (2,), (4,))}


def test_what_a_gradient_does_not_show_is_not_called_unseen() -> None:
    arrays = {"stopped": normal(4), "rounded": normal(4, seed=1) * 9, "dead": -jnp.ones(4), "lost": normal(4, seed=3), "kept": normal(4)}

    def call(arrays: Any) -> jax.Array:
        steps = jax.lax.stop_gradient(arrays["stopped"]) + jnp.round(arrays["rounded"])
        return arrays["kept"] * steps + jax.nn.relu(arrays["dead"] - 9.0)

    assert unseen(call, arrays) == {"dead": WHOLE, "lost": WHOLE}


def test_counts_and_flags_are_unseen_if_they_move_nothing() -> None:
    arrays = {"count": jnp.array(3), "place": jnp.array([1, 0]), "flag": jnp.array(True), "asked": jnp.array(False), "x": normal(2)}

    def call(arrays: Any) -> jax.Array:
        return arrays["x"][arrays["place"]] * jnp.where(arrays["asked"], 1.0, 2.0)

    assert unseen(call, arrays) == {"count": WHOLE, "flag": WHOLE}


def test_running_statistics_of_equinox_are_seen_and_whether_they_are_the_first_is_not() -> None:
    model, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(4, "batch", mode="ema", inference=True)
    x = normal(5, 4)
    found = unseen(lambda both: jax.vmap(lambda row: both[0](row, both[1])[0], axis_name="batch")(x), (model, state))
    assert found == {"ema_first_time_index": WHOLE}


def test_linen_and_narrow_arrays() -> None:
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            self.param("unused", linen.initializers.normal(), (3,))
            return linen.Dense(4, use_bias=False, param_dtype=jnp.bfloat16)(x)

    x = normal(2, 3)
    assert unseen(lambda variables: Model().apply(variables, x), Model().init(KEY, x)) == {"unused": WHOLE}


def test_a_call_that_cannot_be_differentiated_is_made_for_each_array() -> None:
    arrays = {"kernel": normal(4, 4), "token": normal(4), "bias": normal(4, seed=1)}
    call, calls = counted(lambda arrays: np.asarray(arrays["kernel"]) @ np.ones(4, np.float32) + np.asarray(arrays["bias"]))
    assert unseen(call, arrays) == {"token": WHOLE}
    assert len(calls) == 2 + 1 + 3
    with pytest.raises(TypeError):
        insensitive(lambda arrays, _: call(arrays), arrays, [None], one_by_one=False)


def test_calls_are_limited_and_what_they_leave_open_is_not_called_unseen() -> None:
    arrays = {name: normal(3, seed=place) for place, name in enumerate("abcdefgh")}

    def call(arrays: Any, _: None) -> jax.Array:
        return sum((jnp.round(9 * arrays[name]) for name in "abcdefg"), jnp.zeros(3))

    assert insensitive(call, arrays, [None], calls=2) == {}
    assert insensitive(call, arrays, [None]) == {"h": WHOLE}


def test_a_call_must_give_floats() -> None:
    with pytest.raises(ValueError, match="the call gives no floats that could be compared"):
        unseen(lambda arrays: jnp.arange(3), {"x": normal(2)})


def test_results_that_are_not_finite_are_compared_too() -> None:
    arrays = {"x": normal(4), "y": normal(4, seed=1)}

    def call(arrays: Any) -> list[jax.Array]:
        return [jnp.where(jnp.arange(4) > 1, arrays["x"], -jnp.inf), arrays["y"] * jnp.nan]

    assert unseen(call, arrays) == {"x": ((0,), (1,)), "y": WHOLE}
