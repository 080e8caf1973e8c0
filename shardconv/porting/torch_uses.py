"""What a torch module does with its tensors, seen by running it once: every operation passes by, as ATen has it.

The module runs as it is, on the CPU or wherever it lies, so whatever code it has is followed. Fused kernels that hide a layer's parts are
switched off for this one run: attention is two products, and an encoder layer its layers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from shardconv.porting.uses import Dims, Record, Uses, Value, dims_of, reshaped, resized, spread

# Where each kind of contraction has its two factors, and along which of their dims, from the last, it sums.
PRODUCTS = {
    "mm": (0, 1, -1, -2),
    "bmm": (0, 1, -1, -2),
    "matmul": (0, 1, -1, -2),
    "mv": (0, 1, -1, -1),
    "dot": (0, 1, -1, -1),
    "linear": (0, 1, -1, -1),
    "addmm": (1, 2, -1, -2),
    "baddbmm": (1, 2, -1, -2),
    "addmv": (1, 2, -1, -1),
}
RESHAPES = {"view", "_unsafe_view", "reshape", "_reshape_alias", "unsqueeze", "squeeze", "flatten", "unflatten"}
LIKE = {"zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty"}  # of the tensor its shape
# What is linear in what it is given; a quotient is if only one of both is data. Anything else bends.
LINEAR = {"add", "sub", "rsub", "neg", "mul", "cat", "slice", "split", "split_with_sizes"}
LINEAR |= {"clone", "copy", "_to_copy", "detach", "alias", "dropout"}
SUMS = {"add", "sub"}
RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu", "mkldnn_rnn_layer"}  # kernels for whole layers


def torch_uses(module: Any, inputs: Sequence[Any]) -> Uses:
    """What a module does with the tensors of its state dict when it is called with these inputs."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils._python_dispatch import TorchDispatchMode

    state = {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if isinstance(tensor, torch.Tensor)}
    run = _Run(torch, state, inputs)

    class Followed(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            with self:
                found = function.decompose(*args, **kwargs)
            if found is not NotImplemented:
                return found  # its parts have passed by
            found = function(*args, **kwargs)
            run.operation(function, args, kwargs, found)
            return found

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), Followed():  # type: ignore[no-untyped-call, unused-ignore]
            module(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return run.record.uses(run.names)


class _Run:
    """The values of the tensors that there are so far."""

    def __init__(self, torch: Any, state: Mapping[str, Any], inputs: Sequence[Any]) -> None:
        from torch.utils.weak import WeakTensorKeyDictionary

        self.torch = torch
        self.record = Record()
        self.values: Any = WeakTensorKeyDictionary()
        self.written: dict[int, tuple[Any, int]] = {}  # storages that were written into, and what they depend on
        self.names: dict[str, list[str]] = {}
        first: dict[int, str] = {}
        for name, tensor in state.items():
            known = first.setdefault(id(tensor), name)
            self.names.setdefault(known, []).append(name)
            if known == name:
                self.values[tensor] = self.record.array(name, tensor.shape)
        for one in inputs:
            if isinstance(one, torch.Tensor):
                self.values[one] = Value(is_data=True)

    def operation(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], found: Any) -> None:
        """Notes what an operation that has run gave."""
        name = function.overloadpacket.__name__
        outs = self._tensors([found])
        if name.rstrip("_") in LIKE:
            args, kwargs = (), {}
        given = [self._value(tensor) for tensor in self._tensors([*args, *kwargs.values()])]
        for out in outs:
            self.values[out] = self._result(name, args, given, out)
        for argument, schema in zip(args, function._schema.arguments, strict=False):
            if schema.alias_info is not None and schema.alias_info.is_write and isinstance(argument, self.torch.Tensor):
                self._write(argument, self.record.combined([*given], argument.shape))

    def _result(self, name: str, args: Sequence[Any], given: list[Value], out: Any) -> Value:
        record, shape = self.record, tuple(out.shape)
        if name in PRODUCTS:
            first, second, axis, other = PRODUCTS[name]
            one, two = args[first], args[second]
            axes = [axis % one.ndim], [other % two.ndim]
            free = ([len(shape) - 2], [len(shape) - 1]) if one.ndim == two.ndim == len(shape) else ([], [])
            found = record.product(self._value(one), self._value(two), axes, shape, free)
            rest = [self._value(argument) for place, argument in enumerate(args[:3]) if self._is(argument) and place not in (first, second)]
            return record.combined([found, *rest], shape, orders=False)
        if name == "convolution":
            return self._convolution(args, shape)
        if name == "embedding":
            return record.looked_up(self._value(args[0]), self._value(args[1]), [0], shape)
        if name == "index" and given:
            rows = [place for place, index in enumerate(args[1]) if index is not None]
            numbers = record.combined([self._value(args[1][place]) for place in rows], shape)
            return record.looked_up(self._value(args[0]), numbers, rows, shape)
        if name in RECURRENT:
            record.lost |= {record.keys[node][0] for value in given for node, _ in value.parts}
        if moved := self._moved(name, args, shape):
            return record.viewed(self._value(args[0]), moved)
        if name.rstrip("_") == "mul" and len(given) == 2:
            return record.multiplied(given[0], given[1], shape)
        kind, data = name.rstrip("_"), sum(value.is_data for value in given)
        bends = kind not in LINEAR and not (kind == "div" and data < 2)
        return record.combined(given, shape, bends, orders=kind not in SUMS)

    def _convolution(self, args: Sequence[Any], shape: tuple[int, ...]) -> Value:
        image, kernel, bias, transposed = args[0], args[1], args[2], args[6]
        space = range(2, kernel.ndim)
        axes = [1, *space], [0 if transposed else 1, *space]
        found = self.record.product(self._value(image), self._value(kernel), axes, shape, ([], []))
        found = self.record.combined([found, *([self._value(bias)] if self._is(bias) else [])], shape, orders=False)
        labels = ["b", "c", *(f"s{place}" for place in range(len(shape) - 2))]
        return replace(found, dims=dims_of(shape, labels))

    def _moved(self, name: str, args: Sequence[Any], shape: tuple[int, ...]) -> Callable[[Dims], Dims | None] | None:
        if not args or not self._is(args[0]):
            return None
        rank = args[0].ndim
        if name in RESHAPES:
            return lambda dims: reshaped(dims, shape)
        if name in ("t", "transpose", "permute"):
            order = list(range(rank))
            if name == "permute":
                order = [dim % rank for dim in args[1]]
            elif rank > 1:
                one, other = (args[1] % rank, args[2] % rank) if name == "transpose" else (0, 1)
                order[one], order[other] = other, one
            return lambda dims: tuple(dims[place] for place in order)
        if name in ("select", "unbind"):
            dim = (args[1] if len(args) > 1 else 0) % rank
            return lambda dims: resized(dims[:dim] + dims[dim + 1 :], shape)
        if name == "expand":
            return lambda dims: spread(dims, range(len(shape) - rank, len(shape)), shape)
        if len(shape) < rank or (name in ("mean", "sum", "amax", "prod") and math.prod(shape) < args[0].numel()):
            return lambda dims: resized(dims, shape) if len(dims) == len(shape) else None
        return None

    def _value(self, tensor: Any) -> Value:
        """What is known of a tensor; one that nobody has seen is a constant."""
        value: Value = self.values.get(tensor, Value())
        written = self.written.get(self._storage(tensor))
        if written is None:
            return value
        return Value(value.after | written[1], True, value.dims)

    def _write(self, tensor: Any, value: Value) -> None:
        """An operation has written into a tensor, and so into all that share its memory."""
        if value.is_data:
            before = self.written.get(self._storage(tensor), (None, 0))[1]
            self.written[self._storage(tensor)] = (tensor.untyped_storage(), before | value.after)

    def _storage(self, tensor: Any) -> int:
        return int(tensor.untyped_storage()._cdata)

    def _is(self, argument: Any) -> bool:
        return isinstance(argument, self.torch.Tensor)

    def _tensors(self, arguments: Sequence[Any]) -> list[Any]:
        found = []
        for argument in arguments:
            if self._is(argument):
                found.append(argument)
            elif isinstance(argument, list | tuple):
                found += self._tensors(argument)
        return found
