"""The noise of the PyTorch side: the same model run in other ways that give other logits, none of them more right.

Sums may be taken in another order, and no conversion can be told from that. So it is measured: *reordered* runs every contraction over
permuted dims and moves the rotary frequencies by a unit in the last place, which is what two float32 implementations of the same formulas
may differ by. Rounding as the plan rounds is no noise, but what the user asked for; it is done to the source's tensors as they are loaded.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from shardconv.verify.logit_request import Rounding

# Runs of the reference: as transformers computes, in bfloat16, with weights as the plan rounds them, and those with sums reordered.
PLAIN, HALF, ROUNDED = "plain", "bfloat16", "rounded"
# Another order of sums is tried this often, and the largest difference counts: it is one draw of a random number.
ORDERS = ("order 0", "order 1")


# A contraction of two operands, as torch would do it.
Contraction = Callable[[Any, Any], Any]


@contextlib.contextmanager
def computing(run: str, model: Any, place: int = 0) -> Iterator[None]:
    """While this is entered, `model` computes as a run does; `place` is where in the whole model it stands, for other orders elsewhere."""
    import torch

    with contextlib.ExitStack() as entered:
        entered.enter_context(torch.inference_mode())
        if run == HALF:
            entered.enter_context(halves())
        if run in ORDERS:
            order = ORDERS.index(run)
            entered.enter_context(nudged(model, order))
            entered.enter_context(sums(len(ORDERS) * place + order))
        yield


def sums(seed: int) -> contextlib.AbstractContextManager[Any]:
    """All contractions over permuted dims: the same products, added in another order."""
    import torch

    orders = torch.Generator().manual_seed(seed)

    def permuted(contract: Contraction, left: Any, right: Any, *, transposed: bool) -> Any:
        order = torch.randperm(left.shape[-1], generator=orders)
        return contract(left[..., order], right[..., order] if transposed else right[..., order, :])

    return _contractions(permuted)


def halves() -> contextlib.AbstractContextManager[Any]:
    """All contractions of bfloat16 values, added in float32 and rounded to bfloat16, as accelerators do it.

    A CPU without instructions for it takes far longer over its own bfloat16 products (7 s of CPU a block against 1.5 s, at 4096).
    """
    import torch

    def half(contract: Contraction, left: Any, right: Any, *, transposed: bool) -> Any:  # noqa: ARG001
        return contract(left.to(torch.bfloat16).float(), right.to(torch.bfloat16).float()).to(torch.bfloat16).float()

    return _contractions(half)


def _contractions(by: Callable[..., Any]) -> contextlib.AbstractContextManager[Any]:
    """While this is entered, `by` does all contractions, of what torch would do and both operands; a linear layer's is transposed."""
    import torch
    from torch.overrides import TorchFunctionMode

    products = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm}

    class Contractions(TorchFunctionMode):
        def __torch_function__(
            self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            named = kwargs or {}
            if func is torch.addmm:
                added, left, right, *rest = args
                return by(lambda left, right: func(added, left, right, *rest, **named), left, right, transposed=False)
            if func is torch.nn.functional.linear or func in products:
                left, right, *rest = args
                return by(lambda left, right: func(left, right, *rest, **named), left, right, transposed=func is torch.nn.functional.linear)
            return func(*args, **named)

    return Contractions()


@contextlib.contextmanager
def nudged(model: Any, seed: int) -> Iterator[None]:
    """Rotary frequencies moved by a unit in the last place, up or down; the same way in every block."""
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


def rounded(tensors: Mapping[str, Any], roundings: Mapping[str, Rounding]) -> dict[str, Any]:
    """The source's tensors, those with a rounding as they read back: scaled and shifted in float32, rounded, all but that undone again."""
    import torch

    def read_back(tensor: Any, rounding: Rounding) -> Any:
        stored = (tensor.float() * rounding.scale + rounding.shift).to(getattr(torch, rounding.dtype))
        return ((stored.double() - rounding.shift) / rounding.scale).float()

    return {key: read_back(tensor, roundings[key]) if key in roundings else tensor for key, tensor in tensors.items()}
