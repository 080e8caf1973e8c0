"""transformers' own module, run in JAX on the arrays of a written checkpoint; torch holds no weights.

Every array goes back to where the module keeps it, inside of the jitted forward, so that it stays sharded as it is. How it goes back is
taken from the second statement of the flat layout (`flat`), read from right to left, and never from the addresses that wrote it. The
statement knows tensors by the names of published files; the module of transformers 5 stacks experts, and has gate and up in one parameter.

This proves the values and their places. It does not prove that another code base reads the layout so: only that code base can.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from shardconv.errors import CheckError, ConfigError, Problem
from shardconv.interop import torch_in_jax, weightless
from shardconv.verify import flat
from shardconv.verify.restoring import Restored
from shardconv.verify.rows import Row
from shardconv.verify.statement import dims

Leaves = Mapping[str, jax.Array]

# What the module calls a tensor that the files have otherwise; several tensors of one name lie one after another along its second dim.
RENAMED = {
    "block_sparse_moe.gate.weight": "mlp.gate.weight",
    "block_sparse_moe.experts.{x}.w1.weight": "mlp.experts.gate_up_proj",
    "block_sparse_moe.experts.{x}.w3.weight": "mlp.experts.gate_up_proj",
    "block_sparse_moe.experts.{x}.w2.weight": "mlp.experts.down_proj",
    "mlp.experts.{x}.gate_proj.weight": "mlp.experts.gate_up_proj",
    "mlp.experts.{x}.up_proj.weight": "mlp.experts.gate_up_proj",
    "mlp.experts.{x}.down_proj.weight": "mlp.experts.down_proj",
}
# The second of two that share a name.
BEHIND = ("w3.weight", "up_proj.weight")


@dataclass(frozen=True)
class Part:
    """A parameter, or a part of one: `leaf`, or number `layer` of the layers that it stacks, rearranged by `pattern`."""

    leaf: str
    layer: int | None
    axis: int
    pattern: str
    behind: bool

    def of(self, leaves: Leaves) -> jax.Array:
        """Its values in float32."""
        array = leaves[self.leaf]
        if self.layer is not None:
            array = jax.lax.index_in_dim(array, self.layer, self.axis, keepdims=False)
        sizes = {"two": 2} if "two" in self.pattern else {}
        found: jax.Array = rearrange(array.astype(jnp.float32), self.pattern, **sizes)
        return found


def traced_forward(source: str, restored: Restored) -> Callable[[Any], jax.Array]:
    """The logits (batch, length, vocabulary) of the model in the directory `source`, by the arrays of a checkpoint in the flat layout.

    Raises ConfigError for a family that nobody has stated twice, CheckError where leaves and the module's parameters do not fit.
    """
    module = weightless_module(source, tied="unembed" not in restored.leaves)
    parts = parts_of(module, restored)
    shapes = {name: tuple(weight.shape) for name, weight in module.named_parameters()}
    traced = torch_in_jax(module)

    @jax.jit
    def logits(leaves: Leaves, tokens: jax.Array) -> jax.Array:
        params = {name: _cut(joined(found, leaves), shapes[name]) for name, found in parts.items()}
        found: jax.Array = traced(params, tokens, use_cache=False)["logits"]
        return found

    def forward(tokens: Any) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            found: jax.Array = logits(dict(restored.leaves), jnp.asarray(tokens, jnp.int32))
            return found.block_until_ready()

    return forward


def weightless_module(source: str, *, tied: bool) -> Any:
    """transformers' module of a directory with config.json, in float32 with plain attention, its parameters on torch's meta device."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(source, local_files_only=True)
    config.tie_word_embeddings = tied
    make: Any = transformers.AutoModelForCausalLM.from_config
    with weightless():
        module = make(config, dtype=torch.float32, attn_implementation="eager")
    if hasattr(config, "num_experts") or hasattr(config, "num_local_experts"):
        module.set_experts_implementation("grouped_mm")  # the one whose shapes do not depend on values
    return module.eval()


def parts_of(module: Any, restored: Restored) -> dict[str, tuple[Part, ...]]:
    """What each parameter of the module is made of, by name, in the order of its parts."""
    family, scanned = str(restored.metadata["shardconv"]["family"]), bool(restored.metadata["scan_layers"])
    rows = flat.rows(family, scanned)
    if rows is None:
        remedy = 'set check.forward = "package.module:function", or check.mode = "weights"'
        raise ConfigError("check.forward cannot be used", [Problem(f"nobody has stated twice where the flat layout has {family}", remedy)])
    interleaved = restored.metadata.get("rope") == "interleaved"
    found: dict[str, list[Part]] = {}
    for row in rows:
        for name, part in _parts(row, module.config.num_hidden_layers, interleaved):
            if part.leaf in restored.leaves or not row.maybe:
                found.setdefault(name, []).append(part)
    _require_fit(found, dict(module.named_parameters()), restored.leaves)
    return {name: tuple(sorted(parts, key=lambda part: part.behind)) for name, parts in found.items()}


def _parts(row: Row, layers: int, interleaved: bool) -> Iterator[tuple[str, Part]]:
    left, right = row.left, row.right
    if row.rotated and interleaved:
        left = left.replace("h", "two p" if "(" in left else "(two p)")
        right = right.replace("h", "(p two)")
    stacked = dims(right)
    axis = stacked.index("l") if "l" in stacked else None
    pattern = f"{' '.join(dim for dim in stacked if dim != 'l')} -> {'x ' if '{x}' in row.tensor else ''}{left}"
    behind = "{x}" in row.tensor and row.tensor.endswith(BEHIND)
    if "{l}" not in row.tensor:
        yield row.tensor, Part(row.leaf, None, 0, pattern, behind)
        return
    for place, layer in enumerate(range(row.first, layers, row.every)):
        suffix = row.tensor.removeprefix("model.layers.{l}.")
        name = f"model.layers.{layer}.{RENAMED.get(suffix, suffix)}"
        yield name, Part(row.leaf.format(l=place), None if axis is None else place, axis or 0, pattern, behind)


def _require_fit(found: Mapping[str, list[Part]], weights: Mapping[str, Any], leaves: Leaves) -> None:
    used = {part.leaf for parts in found.values() for part in parts}
    problems = [Problem(f"the checkpoint has no {leaf}") for leaf in sorted(used - leaves.keys())]
    problems += [Problem(f"{leaf} is in the checkpoint, and the module has no use for it") for leaf in sorted(leaves.keys() - used)]
    problems += [Problem(f"nothing in the checkpoint is the module's {name}") for name in sorted(weights.keys() - found.keys())]
    problems += [Problem(f"the module has no {name}") for name in sorted(found.keys() - weights.keys())]
    if problems:
        raise CheckError("the checkpoint does not fit transformers' module", problems)


def joined(parts: tuple[Part, ...], leaves: Leaves) -> jax.Array:
    """A parameter of the module, from its parts."""
    arrays = [part.of(leaves) for part in parts]
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis=1)


def _cut(array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Without the rows that pad the vocabulary."""
    return array[: shape[0]] if array.shape[1:] == shape[1:] else array
