"""Families and layouts: tables that say where a code base keeps each parameter.

A *family* says where a published checkpoint keeps its parameters; a *layout* says where a JAX code base wants them. They meet on the
parameter's canonical name and never mention each other, so N families and M layouts are N + M tables. Both are written in the notation
of `shardconv.axes`.

Canonical names are dotted words: `embed`, `layers.attn.q`, `layers.mlp.gate`, `layers.experts.up`, `final_norm`, `unembed`. A parameter
that exists once per layer starts with `layers.`, and its key names the axis `layers`.

What a number *means* is a family's fact, not a name: Gemma's norms multiply by 1 + w, its embeddings are scaled at run time. A layout
says whether it folds such a fact into the stored value (`scale`, `shift`), so that `flat` keeps the bits and `maxtext` gets what it reads.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from shardconv.axes import Address, Axes, address
from shardconv.errors import InputError, Problem

HFConfig = Mapping[str, object]
Size = str | int | Callable[[HFConfig], int]
Fact = float | Callable[[HFConfig], float]


@dataclass(frozen=True, slots=True)
class Param:
    """Parameter `name` is the tensor `key` with dims `dims`; it is number `part` where the dims have a sum.

    `linear` marks a torch Linear's weight, [out, in], whose kernel JAX code multiplies from the right. `when` names the entry of
    config.json that must be true for the parameter to exist.
    """

    name: str
    key: str
    dims: str
    part: int = 0
    linear: bool = False
    when: str = ""

    def address(self, axes: Axes) -> Address:
        """Where the checkpoint keeps it."""
        return address(self.key, self.dims, axes, self.part)


def tensor(name: str, key: str, dims: str, *, when: str = "") -> Param:
    """A parameter that is used as it is stored: an embedding, a norm, a bias."""
    return Param(name, key, dims, when=when)


def linear(name: str, key: str, dims: str, *, when: str = "") -> Param:
    """The weight of a torch Linear, [out, in]."""
    return Param(name, key, dims, linear=True, when=when)


def fused(names: str, key: str, dims: str) -> tuple[Param, ...]:
    """Several Linear weights in one tensor, in the order of the terms of the sum in `dims`."""
    return tuple(Param(name, key, dims, part, linear=True) for part, name in enumerate(names.split()))


@dataclass(frozen=True)
class Family:
    """What every checkpoint of these architectures has in common.

    `axes` gives each axis as an entry of config.json, a number, or a function of the config. `facts` are numbers that the model applies
    at run time: `query_scale` (default head_dim ** -0.5), `norm_shift` (1 where a norm multiplies by 1 + w), `embed_scale`.
    `ignore` lists keys, with `{}` for any number, that no JAX model has. `tied_by_default` is what an absent `tie_word_embeddings` means.
    """

    name: str
    title: str
    architectures: tuple[str, ...]
    axes: Mapping[str, Size]
    params: tuple[Param, ...]
    facts: Mapping[str, Fact] = field(default_factory=dict)
    ignore: tuple[str, ...] = ("model.layers.{}.self_attn.rotary_emb.inv_freq",)
    tied_by_default: bool = False


@dataclass(frozen=True)
class Model:
    """A family with the numbers of one checkpoint's config.json."""

    family: Family
    config: HFConfig
    axes: Mapping[str, int]
    facts: Mapping[str, float]
    params: tuple[Param, ...]

    @property
    def names(self) -> frozenset[str]:
        """The canonical names of its parameters."""
        return frozenset(param.name for param in self.params)

    @property
    def says_tied(self) -> bool:
        """Whether config.json says that the output projection is the embedding; what is in the file decides, see `coverage.is_tied`."""
        said = self.config.get("tie_word_embeddings")
        return self.family.tied_by_default if said is None else bool(said)


@dataclass(frozen=True, slots=True)
class Slot:
    """A layout keeps parameter `param` at `name` with dims `dims`; `scale` and `shift` name the facts folded into the values.

    `dtype` overrides the target dtype of the config where the layout's reader needs another.
    """

    param: str
    name: str
    dims: str
    part: int = 0
    scale: str = ""
    shift: str = ""
    dtype: str = ""


@dataclass(frozen=True)
class Layout:
    """A layout's table for one model: slots, the axes it splits or adds, and what a reader must be told.

    `metadata` goes into the checkpoint, for programs; `notes` are for people, `when_tied` only where no output projection is written.
    """

    name: str
    slots: tuple[Slot, ...]
    axes: Axes = field(default_factory=dict)
    metadata: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    when_tied: str = ""


@dataclass(frozen=True)
class LayoutOptions:
    """What the user chooses about a layout; see `[target]` in the config."""

    scan_layers: bool
    rope: str
    vocab_size: int
    query_dtype: str

    def padding(self, model: Model) -> int:
        """Rows of zeros that follow the vocabulary; raises InputError where rows would be cut off instead."""
        stored = model.axes["vocab"]
        if self.vocab_size and self.vocab_size < stored:
            fact = f"target.vocab_size is {self.vocab_size}, but the checkpoint has {stored} rows"
            raise InputError("the vocabulary would be cut off", [Problem(fact, f"set target.vocab_size to {stored} or more")])
        return self.vocab_size - stored if self.vocab_size else 0


def bind(family: Family, config: HFConfig) -> Model:
    """Fills a family's axes and facts from config.json; raises InputError with everything that they need and do not find there.

    >>> from shardconv.families import families
    >>> bind(families()["llama"], {"hidden_size": 64, "num_attention_heads": 4})
    Traceback (most recent call last):
    shardconv.errors.InputError: config.json does not describe a llama model (3 problems):
      layers: there is no "num_hidden_layers"
          use the config.json that belongs to the checkpoint
      mlp: there is no "intermediate_size"
          use the config.json that belongs to the checkpoint
      vocab: there is no "vocab_size"
          use the config.json that belongs to the checkpoint
    """
    problems: dict[str, list[str]] = {}

    def found(name: str, entry: str | float | Callable[[HFConfig], float]) -> float:
        try:
            return entry(config) if callable(entry) else whole_number(config, entry) if isinstance(entry, str) else entry
        except ValueError as error:
            problems.setdefault(str(error), []).append(name)
            return 1

    axes = {axis: int(found(axis, size)) for axis, size in family.axes.items()}
    facts = {"query_scale": axes.get("head_dim", 1) ** -0.5, "norm_shift": 0.0, "embed_scale": 1.0}
    facts |= {name: found(name, fact) for name, fact in family.facts.items()}
    if problems:
        remedy = "use the config.json that belongs to the checkpoint"
        listed = [Problem(f"{', '.join(names)}: {fact}", remedy) for fact, names in problems.items()]
        raise InputError(f"config.json does not describe a {family.name} model", listed)
    return Model(family, config, axes, facts, tuple(param for param in family.params if not param.when or config.get(param.when)))


def whole_number(config: HFConfig, entry: str) -> int:
    """An entry of config.json that counts something; raises ValueError with what is there instead, which `bind` collects."""
    value = config.get(entry)
    if value is None:
        raise ValueError(f'there is no "{entry}"')
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f'"{entry}" is {json.dumps(value)}, not a positive whole number')
    if value >= 2**63:  # sizes are 64-bit where they are used, and larger ones are no floats either
        raise ValueError(f'"{entry}" is over 2^63')
    return value


def either(*entries: str) -> Callable[[HFConfig], int]:
    """The first of several entries that is there, for one that has been renamed.

    >>> either("num_experts", "num_local_experts")({"num_local_experts": 8})
    8
    """

    def first(config: HFConfig) -> int:
        return whole_number(config, next((entry for entry in entries if config.get(entry) is not None), entries[0]))

    return first


def head_dim(config: HFConfig) -> int:
    """`head_dim`, or hidden_size / num_attention_heads where config.json leaves it out."""
    if config.get("head_dim") is not None:
        return whole_number(config, "head_dim")
    size, heads = whole_number(config, "hidden_size"), whole_number(config, "num_attention_heads")
    if size % heads:
        raise ValueError(f'there is no "head_dim", and "hidden_size" {size} is no multiple of "num_attention_heads" {heads}')
    return size // heads


def kv_heads(config: HFConfig) -> int:
    """`num_key_value_heads`, or num_attention_heads where config.json leaves it out (Llama 1 and 2)."""
    return whole_number(config, "num_attention_heads" if config.get("num_key_value_heads") is None else "num_key_value_heads")


DECODER_AXES: Mapping[str, Size] = {
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": kv_heads,
    "head_dim": head_dim,
    "embed": "hidden_size",
    "mlp": "intermediate_size",
    "vocab": "vocab_size",
}


def renamed(params: Sequence[Param], **names: str) -> tuple[Param, ...]:
    """The same rows under other canonical names: `renamed(ROWS, mlp_norm="attn_post_norm")` for `layers.mlp_norm`."""
    moved = {f"layers.{old}": f"layers.{new}" for old, new in names.items()}
    return tuple(replace(param, name=moved.get(param.name, param.name)) for param in params)
