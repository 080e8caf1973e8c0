"""What a decoder computes, as frozen values: all that `decoder` needs to know besides the arrays.

A *role* is what an array does in a block ("q", "mlp_norm", "experts_up"). The roles say which parts a block has: there is a bias where
there is a role for one. Arrays come as JAX code bases hold them, contracted dims first:

    q k v        embed heads head_dim          their biases  heads head_dim
    o            heads head_dim embed          norms         embed, or head_dim for one per head
    gate up      embed mlp                     down          mlp embed
    router       embed experts                 experts_*     experts first
    embed        vocab embed                   unembed       embed vocab; absent where the embedding is used
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Norm:
    """RMS norm ("rms") or layer norm ("layer"), multiplying by `shift` + the stored scale."""

    kind: str
    eps: float
    shift: float = 0.0


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of the first `dims` dims of a head.

    `pairs` rotates neighbours (2j, 2j + 1), else j and j + dims / 2. `scaling` is "default", "linear", "llama3" or "yarn"; the numbers
    are those of config.json and mean what they mean there. `magnitude` multiplies sine and cosine.
    """

    base: float
    dims: int
    pairs: bool = False
    scaling: str = "default"
    factor: float = 1.0
    original_length: int = 0
    low: float = 1.0
    high: float = 1.0
    truncate: bool = True
    magnitude: float = 1.0


@dataclass(frozen=True)
class Routing:
    """`chosen` experts per token by the "softmax" or "sigmoid" of the router's logits; `normalised` weights sum to one."""

    kind: str
    chosen: int
    normalised: bool


@dataclass(frozen=True)
class Decoder:
    """A decoder-only transformer. `windows` has, per layer, how many tokens back a token sees, itself included; None is all.

    `parallel` adds attention and MLP to the same input. `head_norm` "head" norms each query and key head, "all" all of them as one.
    """

    name: str
    embed: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    windows: tuple[int | None, ...]
    norm: Norm
    rope: Rope | None
    activation: str
    query_scale: float
    block_roles: frozenset[str]
    end_roles: frozenset[str]
    tied: bool
    routing: Routing | None = None
    parallel: bool = False
    head_norm: str = "head"
    embed_scale: float = 1.0
    logit_scale: float = 1.0
    attention_cap: float | None = None
    logit_cap: float | None = None

    @property
    def layers(self) -> int:
        """The number of blocks."""
        return len(self.windows)


@dataclass(frozen=True)
class Place:
    """Where an array is: a whole leaf of the checkpoint, or number `index` along `axis` of one that stacks layers."""

    leaf: str
    index: int | None = None
    axis: int = 0


@dataclass(frozen=True)
class Reading:
    """How a code base reads a checkpoint: the decoder as it runs it, and the place of every role, at the ends and per block."""

    decoder: Decoder
    ends: dict[str, Place]
    blocks: tuple[dict[str, Place], ...]

    def places(self) -> Iterator[Place]:
        """All places."""
        yield from self.ends.values()
        for block in self.blocks:
            yield from block.values()
