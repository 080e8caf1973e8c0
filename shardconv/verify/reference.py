"""The PyTorch side: transformers' own model, built from config.json and loaded from the source files, and how much it differs from itself.

The same model gives other logits when sums are taken in another order, and no conversion can be told from that. So the noise is
measured: `reordered` runs every contraction of a forward over permuted dims and moves the rotary frequencies by a unit in the last place,
which is what two float32 implementations of the same formulas may differ by. Where the plan rounds values, weights can be `rounded` alike:
that is no noise, but what the user asked for.

A weight that the files lack would be made up by transformers, and the comparison worthless: it is an error here.
"""

import contextlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shardconv.errors import ConfigError, InputError, Problem
from shardconv.verify.logit_request import Rounding

Logits = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int64]

# What transformers says of its loading that makes a comparison worthless.
MISFITS = {"missing_keys": "has no {}", "mismatched_keys": "has {} in another shape", "unexpected_keys": "has {}, which the model has not"}


def require_torch() -> None:
    """Raises ConfigError where torch or transformers is not installed."""
    absent = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if absent:
        said = f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed"
        remedy = 'pip install "shardconv[check]", or set check.mode = "weights"'
        raise ConfigError("comparing logits needs the PyTorch model", [Problem(said, remedy)])


@dataclass(frozen=True)
class Run:
    """Logits (length, vocab), and what the routers of a model with experts scored, (layers, length, experts), if it tells."""

    logits: Logits
    routers: Logits | None


@dataclass(frozen=True)
class Reference:
    """A model in float32 on the CPU, and the runs of it that are wanted for one sequence of token ids (length,)."""

    model: Any

    @property
    def chosen(self) -> int:
        """How many experts a token goes to; 0 without experts."""
        return int(getattr(self.model.config, "num_experts_per_tok", None) or 0)

    def run(self, tokens: Tokens) -> Run:
        """As transformers computes it."""
        import torch

        asked = {"output_router_logits": True} if self.chosen and hasattr(self.model.config, "output_router_logits") else {}
        with torch.inference_mode():
            found = self.model(input_ids=torch.from_numpy(tokens)[None], use_cache=False, **asked)
            routers = getattr(found, "router_logits", None)
            scores = torch.stack([layer.float() for layer in routers]).numpy() if routers else None
            return Run(found.logits[0].float().numpy(), scores)

    def reordered(self, tokens: Tokens, seed: int) -> Run:
        """With all sums in another order."""
        with _nudged(self.model, seed), _sums(seed):
            return self.run(tokens)

    def in_bfloat16(self, tokens: Tokens) -> Run:
        """With matrix products in bfloat16."""
        import torch

        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.run(tokens)

    def rounded(self, roundings: Mapping[str, Rounding]) -> contextlib.AbstractContextManager[None]:
        """While this is entered, weights are rounded, by the source's names of tensors."""
        return _rounded(self.model, roundings)


def load_reference(path: str) -> Reference:
    """transformers' model of a checkpoint's directory, in float32 with eager attention.

    Raises ConfigError without torch or transformers, InputError where the files do not hold exactly the model's weights.
    """
    require_torch()
    import torch
    import transformers

    make: Any = transformers.AutoModelForCausalLM.from_pretrained
    if not os.path.exists(os.path.join(path, "config.json")):
        raise InputError("the PyTorch model cannot be made", [Problem(f"{path} has no config.json", "put it beside the weights")])
    with _quiet():
        model, said = make(
            path,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            output_loading_info=True,
            **_plain_experts(path),
        )
    problems = [Problem(f"{path} {text.format(key)}") for kind, text in MISFITS.items() for key in sorted(map(str, said[kind]))]
    if problems:
        raise InputError("transformers' model and the checkpoint do not fit each other", problems)
    return Reference(model.eval())


def _plain_experts(path: str) -> dict[str, str]:
    """Experts computed one by one, not by a fused kernel: the plain formulas, whose contractions are seen by `_sums`."""
    with open(os.path.join(path, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    return {"experts_implementation": "eager"} if {"num_experts", "num_local_experts"} & config.keys() else {}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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


def _sums(seed: int) -> contextlib.AbstractContextManager[Any]:
    """All contractions over permuted dims: the same products, added in another order."""
    import torch
    from torch.overrides import TorchFunctionMode

    products = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm}
    orders = torch.Generator().manual_seed(seed)

    class Sums(TorchFunctionMode):
        def __torch_function__(
            self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            if func is torch.nn.functional.linear or func in products:
                left, right, *rest = args
                order = torch.randperm(left.shape[-1], generator=orders)
                right = right[..., order] if func is torch.nn.functional.linear else right[..., order, :]
                args = (left[..., order], right, *rest)
            return func(*args, **(kwargs or {}))

    return Sums()


@contextlib.contextmanager
def _nudged(model: Any, seed: int) -> Iterator[None]:
    """Rotary frequencies moved by a unit in the last place, up or down."""
    import torch

    found = {name: buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2] == "inv_freq"}
    kept = {name: buffer.clone() for name, buffer in found.items()}
    signs = torch.Generator().manual_seed(seed)
    for buffer in found.values():
        up = torch.rand(buffer.shape, generator=signs) < 0.5
        buffer.copy_(torch.nextafter(buffer, torch.where(up, torch.inf, -torch.inf)))
    try:
        yield
    finally:
        for name, buffer in found.items():
            buffer.copy_(kept[name])


@contextlib.contextmanager
def _rounded(model: Any, roundings: Mapping[str, Rounding]) -> Iterator[None]:
    """The weights rounded as a plan says; each is put back after, so that is one more copy of those concerned.

    transformers stacks experts and renames some tensors; what no tensor has the name of is rounded as those are that have no weight.
    """
    import torch

    weights = dict(model.named_parameters())
    others = next((rounding for key, rounding in roundings.items() if key not in weights), None)
    chosen = {name: roundings.get(name, others) for name in weights}
    kept = {name: weights[name].detach().clone() for name, rounding in chosen.items() if rounding is not None}
    with torch.no_grad():
        for name in kept:
            weights[name].copy_(_round(weights[name], chosen[name]))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weight in kept.items():
                weights[name].copy_(weight)


def _round(weight: Any, rounding: Any) -> Any:
    """A weight as it reads back: scaled and shifted in float32, rounded, and all but the rounding undone, in float64."""
    import torch

    stored = (weight * rounding.scale + rounding.shift).to(getattr(torch, rounding.dtype))
    return (stored.double() - rounding.shift) / rounding.scale
