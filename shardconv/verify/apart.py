"""transformers' model taken apart: one block, or the two ends, each loaded as a model of its own.

A block of any decoder is run by transformers' own code through its public API: a model of the same class with one layer and next to no
vocabulary is loaded from that block's tensors, so that transformers renames and stacks them itself, and hooks put a state before the
layer and take the one behind it. The ends are a model without layers, in which a stand-in takes the embedded tokens and hands any state on
to the final norm and the output projection. What is known of transformers beyond its API is in this file: that the layers are the
first list of as many modules as there are layers, that a config's lists of that length are per layer, and where a block's parts are.

A weight that the files lack would be made up, and one too many left out; `misfits` says so in words.
"""

import contextlib
import copy
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shardconv.errors import InputError, Problem
from shardconv.verify.published import BLOCK, renumbered

# What transformers says of its loading that makes a comparison worthless.
MISFITS = {"missing_keys": "has no {}", "mismatched_keys": "has {} in another shape", "unexpected_keys": "has {}, which the model has not"}
# Rows of the embedding of a model of one block, which nobody looks at.
FEW = 8


@dataclass(frozen=True)
class Architecture:
    """What config.json says: transformers' config, and the class of its model."""

    path: str
    config: Any
    kind: Any

    @property
    def layers(self) -> int:
        """The number of blocks."""
        return int(self.config.num_hidden_layers)

    @property
    def vocab(self) -> int:
        """The number of token ids."""
        return int(self.config.vocab_size)

    @property
    def chosen(self) -> int:
        """How many experts a token goes to; 0 without experts."""
        return int(getattr(self.config, "num_experts_per_tok", None) or 0)


def architecture(path: str) -> Architecture:
    """The architecture of a checkpoint's directory; raises InputError where there is none, or none of a decoder."""
    import transformers

    if not os.path.exists(os.path.join(path, "config.json")):
        raise InputError("the PyTorch model cannot be made", [Problem(f"{path} has no config.json", "put it beside the weights")])
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        fact = f"transformers has no decoder for model_type {config.model_type!r}"
        raise InputError("the PyTorch model cannot be made", [Problem(fact)])
    return Architecture(path, config, transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])


@dataclass(frozen=True)
class Block:
    """Block `number` alone: the model around it, and its layer."""

    number: int
    model: Any
    layer: Any
    problems: tuple[Problem, ...]

    def run(self, state: Any, parts: dict[str, Any] | None = None) -> tuple[Any, Any]:
        """The state behind the block, (batch, length, embed) as that before it, and its router's scores, (batch, length, experts) or None.

        What the block's parts give goes into `parts`, by role, if that is a dict.
        """
        import torch

        found = {}

        def enter(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return ((state, *given[1:]), named) if given else (given, {**named, "hidden_states": state})

        def leave(_: Any, __: tuple[Any, ...], output: Any) -> None:
            found["state"] = output[0] if isinstance(output, tuple) else output

        asked = {"output_router_logits": True} if hasattr(self.model.config, "output_router_logits") else {}
        tokens = torch.zeros(state.shape[:2], dtype=torch.int64)
        with contextlib.ExitStack() as hooks:
            hooks.enter_context(_hook(self.layer.register_forward_pre_hook(enter, with_kwargs=True)))
            hooks.enter_context(_hook(self.layer.register_forward_hook(leave)))
            if parts is not None:
                hooks.enter_context(_listening(self.layer, parts))
            output = self.model(input_ids=tokens, use_cache=False, **asked)
        scores = getattr(output, "router_logits", None)
        return found["state"], scores[0].float().reshape(*tokens.shape, -1) if scores else None


@contextlib.contextmanager
def _hook(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


# Where the parts of a block are in transformers' layers: the module whose output it is, or, marked "<", whose input. Of several names the
# first that a layer has counts. A fused projection of query, key and value has no part here: a fault in it shows in what the heads give.
PLACES: Mapping[str, tuple[str, ...]] = {
    "attn_norm": ("input_layernorm", "ln_1"),
    "q": ("self_attn.q_proj",),
    "k": ("self_attn.k_proj",),
    "v": ("self_attn.v_proj",),
    "q_norm": ("self_attn.q_norm",),
    "k_norm": ("self_attn.k_norm",),
    "heads": ("<self_attn.o_proj", "<attention.dense", "<attn.c_proj"),
    "o": ("self_attn.o_proj", "attention.dense", "attn.c_proj"),
    "attn_post_norm": ("post_attention_layernorm",),
    "mlp_norm": ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2"),
    "router": ("mlp.gate", "block_sparse_moe.gate"),
    "experts": ("mlp.experts", "block_sparse_moe.experts"),
    "gate": ("mlp.gate_proj",),
    "up": ("mlp.up_proj", "mlp.dense_h_to_4h", "mlp.c_fc"),
    "inner": ("<mlp.down_proj", "<mlp.dense_4h_to_h", "<mlp.c_proj"),
    "down": ("mlp.down_proj", "mlp.dense_4h_to_h", "mlp.c_proj"),
    "mlp_post_norm": ("post_feedforward_layernorm",),
}


@contextlib.contextmanager
def _listening(layer: Any, parts: dict[str, Any]) -> Iterator[None]:
    """While this is entered, what the parts of a layer give goes into `parts`."""
    modules = dict(layer.named_modules())
    with contextlib.ExitStack() as hooks:
        for role, places in PLACES.items():
            place = next((place for place in places if place.removeprefix("<") in modules), None)
            # Without a norm of its own before the MLP, post_attention_layernorm is that norm.
            if place is None or (role == "attn_post_norm" and "pre_feedforward_layernorm" not in modules):
                continue

            def leave(_: Any, given: tuple[Any, ...], output: Any, role: str = role, before: bool = place.startswith("<")) -> None:
                tensor = given[0] if before else output[0] if isinstance(output, tuple) else output
                parts[role] = tensor.float().clone()

            hooks.enter_context(_hook(modules[place.removeprefix("<")].register_forward_hook(leave)))
        yield


def block(model: Architecture, number: int, tensors: Mapping[str, Any]) -> Block:
    """A block from its tensors, in float32."""
    config = _of_layers(model, [number])
    config.vocab_size, config.pad_token_id = FEW, None
    renamed = {renumbered(key, 0): tensor for key, tensor in tensors.items()}
    loaded, said = _loaded(model, config, renamed)
    said = {kind: {renumbered(key, number) for key in keys if BLOCK.search(key)} for kind, keys in said.items()}
    problems = misfits(model.path, said)
    return Block(number, loaded, _layers(loaded, 1)[0], problems)


@dataclass(frozen=True)
class Ends:
    """Embedding, final norm and output projection, with a stand-in for all blocks."""

    model: Any
    layers: Any
    problems: tuple[Problem, ...]

    def embed(self, tokens: Any) -> Any:
        """The state before the first block, (batch, length, embed), of token ids (batch, length)."""
        standin = self.layers[0]
        standin.given = None
        with contextlib.suppress(_ReachedError):
            self.model(input_ids=tokens, use_cache=False)
        return standin.seen

    def logits(self, state: Any, parts: dict[str, Any] | None = None) -> Any:
        """Logits (batch, length, vocab) of the state behind the last block; what the final norm gives goes into `parts` if it is a dict."""
        import torch

        self.layers[0].given = state

        def enter(_: Any, given: tuple[Any, ...]) -> None:
            if parts is not None:
                parts["final_norm"] = given[0].float().clone()

        with _hook(self.model.get_output_embeddings().register_forward_pre_hook(enter)):
            return self.model(input_ids=torch.zeros(state.shape[:2], dtype=torch.int64), use_cache=False).logits


def ends(model: Architecture, tensors: Mapping[str, Any], *, head: bool) -> Ends:
    """The ends from their tensors, in float32; with `head`, the embedding is dropped unless the output projection is the same."""
    import torch

    config = _of_layers(model, [])
    _per_layer(config, model, [0])  # when it is made, a model decides which masks it will need
    loaded, said = _loaded(model, config, dict(tensors))
    problems = misfits(model.path, said)
    if head and loaded.get_output_embeddings().weight is not loaded.get_input_embeddings().weight:
        loaded.set_input_embeddings(torch.nn.Embedding(FEW, loaded.get_input_embeddings().weight.shape[1]))
    layers = _layers(loaded, 0)
    layers.append(_standin())
    loaded.config.num_hidden_layers = 1
    return Ends(loaded, layers, problems)


class _ReachedError(Exception):
    """A state has reached the stand-in, and nothing more is wanted."""


def _standin() -> Any:
    import torch

    class StandIn(torch.nn.Module):
        """In place of the blocks: keeps what it is given, and hands on what it was told to."""

        seen: Any = None
        given: Any = None

        def forward(self, state: Any, *_: Any, **__: Any) -> Any:
            self.seen = state
            if self.given is None:
                raise _ReachedError
            return self.given

    return StandIn()


def _of_layers(model: Architecture, chosen: list[int]) -> Any:
    """The config of a model of these layers."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(chosen)
    _per_layer(config, model, chosen)
    return config


def _per_layer(config: Any, model: Architecture, chosen: list[int]) -> None:
    """A config's lists with an entry per layer as those of the chosen layers."""
    for name, entries in vars(model.config).items():
        if isinstance(entries, list | tuple) and len(entries) == model.layers and not name.startswith("_"):
            setattr(config, name, type(entries)(entries[number] for number in chosen))


def _layers(loaded: Any, count: int) -> Any:
    """The list of a model's layers: the first that has as many modules, from the outside in."""
    import torch

    found = (module for module in loaded.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == count)
    layers = next(found, None)
    if layers is None:
        fact = f"{type(loaded).__name__} has no list of its layers"
        raise InputError("the PyTorch model cannot be taken apart", [Problem(fact, 'set check.mode = "weights"')])
    return layers


def _loaded(model: Architecture, config: Any, tensors: dict[str, Any]) -> tuple[Any, Mapping[str, set[str]]]:
    """A model in float32, and the names of tensors that did not fit, by kind of misfit."""
    import torch

    # Experts one by one and not by a fused kernel: the plain formulas, whose contractions are seen by `noise.sums`.
    experts = {"experts_implementation": "eager"} if model.chosen else {}
    with quiet():
        loaded, said = model.kind.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **experts,
        )
    # Of tensors in another shape both shapes are told besides.
    return loaded.eval(), {kind: {str(key[0] if isinstance(key, tuple) else key) for key in said[kind]} for kind in MISFITS}


def misfits(path: str, said: Mapping[str, Iterable[str]]) -> tuple[Problem, ...]:
    """What transformers says of its loading, in words."""
    return tuple(Problem(f"{path} {text.format(key)}") for kind, text in MISFITS.items() for key in sorted(said[kind]))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Loading without transformers' progress bars and remarks: problems are raised, not printed."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
