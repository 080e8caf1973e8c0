"""Models whose names say nothing: the same in torch and in JAX, with layers of equal shapes."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen, nnx

WIDE, HEADS, TOKENS = 8, 2, 5
KEY = jax.random.key(0)


def shaken(module: Any) -> Any:
    """A module with other numbers everywhere."""
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.copy_(torch.randn_like(tensor) / 2)
    return module.eval()


def inputs(*shape: int) -> tuple[Any, Any]:
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return torch.from_numpy(x), jnp.asarray(x)


class TorchBlock(torch.nn.Module):
    """A transformer's block, all of its matrices square, its gate after its up."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("a", "b", "c", "d", "e", "f", "g"):
            setattr(self, name, torch.nn.Linear(WIDE, WIDE))
        self.x = torch.nn.LayerNorm(WIDE, eps=1e-6)
        self.y = torch.nn.LayerNorm(WIDE, eps=1e-6)

    def forward(self, x: Any) -> Any:
        h = self.x(x)
        q, k, v = (m(h).unflatten(-1, (HEADS, -1)).transpose(-2, -3) for m in (self.a, self.b, self.c))
        h = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.d(h.transpose(-2, -3).flatten(-2))
        h = self.y(x)
        return x + self.g(torch.nn.functional.silu(self.f(h)) * self.e(h))


def attended(q: Any, k: Any, v: Any) -> Any:
    """Attention of (tokens, features)."""
    q, k, v = (one.reshape(*one.shape[:-1], HEADS, -1) for one in (q, k, v))
    scores = jnp.einsum("...qhd,...khd->...hqk", q, k) / (WIDE // HEADS) ** 0.5
    found = jnp.einsum("...hqk,...khd->...qhd", jax.nn.softmax(scores), v)
    return found.reshape(*found.shape[:-2], -1)


class LinenBlock(linen.Module):
    """The same; `Dense_0` is the value, since it is made first, `Dense_1` the key, `Dense_6` the up."""

    @linen.compact
    def __call__(self, x: Any, _: Any = None) -> Any:
        h = linen.LayerNorm()(x)
        v, k, q = linen.Dense(WIDE)(h), linen.Dense(WIDE)(h), linen.Dense(WIDE)(h)
        x = x + linen.Dense(WIDE)(attended(q, k, v))
        h = linen.LayerNorm()(x)
        out, gate, up = linen.Dense(WIDE), linen.Dense(WIDE), linen.Dense(WIDE)
        return x + out(linen.silu(gate(h)) * up(h)), None


class LinenBlocks(linen.Module):
    """Some of them, one after another."""

    layers: int = 2

    @linen.compact
    def __call__(self, x: Any) -> Any:
        for _ in range(self.layers):
            x, _ = LinenBlock()(x)
        return x


class LinenScan(linen.Module):
    """Some of them in one array each."""

    layers: int = 3

    @linen.compact
    def __call__(self, x: Any) -> Any:
        block = linen.scan(linen.remat(LinenBlock), variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers)
        return block(name="stack")(x, None)[0]


class NnxBlock(nnx.Module):
    """The same, in a list."""

    def __init__(self, rngs: Any) -> None:
        self.parts = nnx.List([nnx.Linear(WIDE, WIDE, rngs=rngs) for _ in range(7)])
        self.scales = nnx.List([nnx.LayerNorm(WIDE, rngs=rngs) for _ in range(2)])

    def __call__(self, x: Any) -> Any:
        up, gate, down, out, v, k, q = self.parts
        second, first = self.scales
        h = first(x)
        x = x + out(attended(q(h), k(h), v(h)))
        h = second(x)
        return x + down(jax.nn.silu(gate(h)) * up(h))


class NnxScan(nnx.Module):
    """Three of them, each array of three layers."""

    def __init__(self, rngs: Any) -> None:
        self.stack = nnx.split_rngs(splits=3)(nnx.vmap(NnxBlock, in_axes=(0,), out_axes=0))(rngs)

    def __call__(self, x: Any) -> Any:
        return nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.stack)


class EqxBlock(eqx.Module):
    """The same, of one example."""

    parts: list[Any]
    scales: list[Any]

    def __init__(self, key: Any) -> None:
        del key
        self.parts = [eqx.nn.Linear(WIDE, WIDE, key=jax.random.key(0)) for _ in range(7)]
        self.scales = [eqx.nn.LayerNorm(WIDE, eps=1e-6) for _ in range(2)]

    def __call__(self, x: Any) -> Any:
        up, gate, down, out, v, k, q = (jax.vmap(part) for part in self.parts)
        second, first = (jax.vmap(scale) for scale in self.scales)
        h = first(x)
        x = x + out(attended(q(h), k(h), v(h)))
        h = second(x)
        return x + down(jax.nn.silu(gate(h)) * up(h))


class EqxScan(eqx.Module):
    """Three of them, each array of three layers."""

    stack: EqxBlock

    def __init__(self, key: Any) -> None:
        self.stack = eqx.filter_vmap(EqxBlock)(jax.random.split(key, 3))

    def __call__(self, x: Any) -> Any:
        arrays, rest = eqx.partition(self.stack, eqx.is_array)
        return jax.lax.scan(lambda x, part: (eqx.combine(part, rest)(x), None), x, arrays)[0]
