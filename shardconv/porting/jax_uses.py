"""What a JAX model does with its arrays, read from the jaxpr of the user's own call.

The arrays are the inputs of the traced function, so it does not matter which library the model is of. A scan is followed turn by turn:
layers that are stacked in one array are told apart there as they are where each is a module.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, Literal

from shardconv.porting.trees import Tree
from shardconv.porting.uses import Dims, Record, Uses, Value, dims_of, reshaped, resized, spread

TURNS = 512  # a longer scan, over time, is followed as a loop: until nothing new depends on anything
# What is linear in what it is given; a quotient is if only one of both is data. Anything else bends.
LINEAR = {"add", "sub", "neg", "split", "concatenate", "pad", "copy", "optimization_barrier", "sharding_constraint", "reduce_sum"}
SUMS = {"add", "sub", "add_any"}
RESHAPES = {"reshape", "squeeze", "expand_dims"}


def jax_uses(call: Callable[[Any], Any], tree: Tree, inputs: Sequence[np.ndarray[Any, Any]] = ()) -> Uses:
    """What a call does with the arrays of a model.

    `inputs` are the numbers that go into it: where arrays that the call closes over have the same, in any order, other ones are constants,
    such as tables of angles. Raises whatever the user's code does where it cannot be traced.
    """
    shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in tree.leaves.items()}
    traced = jax.make_jaxpr(lambda arrays: call(tree.copied(arrays)))(shapes)
    names = [path[0].key for path, _ in jax.tree_util.tree_flatten_with_path(shapes)[0]]
    large = [const for const in _consts(traced) if np.size(const) > 1]
    sorts = [_numbers(one) for one in inputs]
    same = [const for const in large if any(np.array_equal(_numbers(const), one) for one in sorts if one.size == np.size(const))]
    run = _Run({id(const) for const in same or large})
    run.closed(traced, [run.record.array(name, tree.shapes[name]) for name in names])
    return run.record.uses({})


def _consts(inner: Any) -> Iterator[Any]:
    """The arrays that a function and all functions in it close over."""
    if _is_closed(inner):
        yield from inner.consts
    for equation in (inner.jaxpr if _is_closed(inner) else inner).eqns:
        for value in equation.params.values():
            for one in value if isinstance(value, tuple) else [value]:
                if isinstance(one, Jaxpr) or _is_closed(one):
                    yield from _consts(one)


def _is_closed(inner: Any) -> bool:
    """Whether a jaxpr has its constants with it: a class of its own in JAX 0.10, any jaxpr in 0.12."""
    return hasattr(inner, "jaxpr") and hasattr(inner, "consts")


def _numbers(array: Any) -> np.ndarray[Any, Any]:
    extended = jnp.issubdtype(array.dtype, jax.dtypes.extended)  # keys of random numbers
    return np.zeros(0) if extended else np.sort(np.asarray(array, np.float64), axis=None)


class _Run:
    def __init__(self, data: set[int]) -> None:
        self.data = data  # the constants that are the model's input, by id
        self.record = Record()
        self.joins = True  # whether products of two results become nodes: not in loops whose turns nobody counts

    def _jaxpr(self, jaxpr: Jaxpr, consts: Sequence[Value], given: Sequence[Value]) -> list[Value]:
        known: dict[Any, Value] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *given], strict=True))

        def read(variable: Any) -> Value:
            return Value() if isinstance(variable, Literal) else known[variable]

        for equation in jaxpr.eqns:
            found = self.equation(equation, [read(variable) for variable in equation.invars])
            known.update(zip(equation.outvars, found, strict=True))
        return [read(variable) for variable in jaxpr.outvars]

    def equation(self, equation: Any, given: list[Value]) -> list[Value]:
        """The results of one operation."""
        name, params = equation.primitive.name, equation.params
        shapes = [getattr(variable.aval, "shape", ()) for variable in equation.outvars]
        if name == "scan":
            return self._scan(params, given)
        if name == "while":
            return self._while(params, given)
        if name == "cond":
            branches = [self.closed(branch, given[1:]) for branch in params["branches"]]
            return [self.record.combined([given[0], *found], shape) for *found, shape in zip(*branches, shapes, strict=True)]
        if inner := [value for value in params.values() if isinstance(value, Jaxpr) or _is_closed(value)]:
            return self._called(inner, given, shapes)
        if name == "dot_general":
            sums, batch = params["dimension_numbers"]
            ranks = [len(variable.aval.shape) for variable in equation.invars]
            first = len(batch[0]), ranks[0] - len(sums[0])
            free = range(*first), range(first[1], len(shapes[0]))
            return [self.record.product(given[0], given[1], sums, shapes[0], free, self.joins)]
        if name == "mul":
            return [self.record.multiplied(given[0], given[1], shapes[0])]
        if name == "conv_general_dilated":
            return [self._convolution(params["dimension_numbers"], given, shapes[0])]
        if name == "gather":
            numbers = params["dimension_numbers"]
            return [self.record.looked_up(given[0], given[1], numbers.start_index_map, shapes[0])]
        if name == "slice" and (layer := self._layer(equation, given[0])) is not None:
            return [layer]
        if given and (moved := _moved(equation, shapes[0])):
            return [self.record.viewed(given[0], moved)]
        return [self._other(given, shape, equation) for shape in shapes]

    def _other(self, given: list[Value], shape: Sequence[int], equation: Any) -> Value:
        ranks = [len(getattr(variable.aval, "shape", ())) for variable in equation.invars]
        name = equation.primitive.name
        data = sum(value.is_data for value in given)
        bends = name not in LINEAR and not (name == "div" and data < 2)
        found = self.record.combined(given, shape, bends, orders=name not in SUMS)
        if len(shape) < max(ranks, default=0):
            return replace(found, dims=None, parts=tuple((node, None) for node, _ in found.parts))
        return found

    def _convolution(self, numbers: Any, given: list[Value], shape: Sequence[int]) -> Value:
        left, right, out = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
        found = self.record.product(given[0], given[1], (left[1:], right[1:]), shape, ([], []))
        labels: list[int | str] = [""] * len(shape)
        for place, label in zip(out, ["b", "c", *(f"s{dim}" for dim in range(len(shape) - 2))], strict=True):
            labels[place] = label
        return replace(found, dims=dims_of(shape, labels))

    def _layer(self, equation: Any, value: Value) -> Value | None:
        """One layer of stacked arrays, taken by its number."""
        shape, start, limit = equation.invars[0].aval.shape, equation.params["start_indices"], equation.params["limit_indices"]
        one = len(shape) > 1 and limit[0] - start[0] == 1 < shape[0]
        if not value.parts or not one or any(start[1:]) or tuple(limit[1:]) != shape[1:]:
            return None
        found = self.record.layer(value, start[0])
        return self.record.viewed(found, lambda dims: ((), *dims))

    def _called(self, inner: list[Any], given: list[Value], shapes: list[Sequence[int]]) -> list[Value]:
        """A function in a function; the first is the one that computes, others its derivatives."""
        jaxpr = inner[0].jaxpr if _is_closed(inner[0]) else inner[0]
        if len(jaxpr.invars) == len(given) and len(jaxpr.outvars) == len(shapes):
            return self.closed(inner[0], given)
        self.record.lost |= {self.record.keys[node][0] for value in given for node, _ in value.parts}
        return [self.record.combined(given, shape) for shape in shapes]

    def closed(self, inner: Any, given: Sequence[Value]) -> list[Value]:
        """The results of a function with its constants."""
        if not _is_closed(inner):
            return self._jaxpr(inner, [Value()] * len(inner.constvars), given)
        return self._jaxpr(inner.jaxpr, [Value(is_data=id(const) in self.data) for const in inner.consts], given)

    def _scan(self, params: Mapping[str, Any], given: list[Value]) -> list[Value]:
        fixed, carried, length = params["num_consts"], params["num_carry"], params["length"]
        consts, carry, stacks = given[:fixed], given[fixed : fixed + carried], given[fixed + carried :]
        turns = range(length - 1, -1, -1) if params["reverse"] else range(length)
        results: list[list[Value]] = []
        if length <= TURNS:
            for turn in turns:
                found = self.closed(params["jaxpr"], [*consts, *carry, *(self.record.layer(stack, turn) for stack in stacks)])
                carry = found[:carried]
                results.append(found[carried:])
        else:
            slices = [replace(stack, dims=None, parts=tuple((node, None) for node, _ in stack.parts)) for stack in stacks]
            found = self._repeated(lambda carry: self.closed(params["jaxpr"], [*consts, *carry, *slices]), carry, carried)
            carry = found[:carried]
            results.append(found[carried:])
        shapes = [aval.shape for aval in params["jaxpr"].out_avals[carried:]]
        return [*carry, *(self.record.combined(some, (length, *shape)) for *some, shape in zip(*results, shapes, strict=True))]

    def _while(self, params: Mapping[str, Any], given: list[Value]) -> list[Value]:
        asked, fixed = params["cond_nconsts"], params["body_nconsts"]
        consts, carry = given[asked : asked + fixed], given[asked + fixed :]
        return self._repeated(lambda carry: self.closed(params["body_jaxpr"], [*consts, *carry]), carry, len(carry))

    def _repeated(self, body: Callable[[list[Value]], list[Value]], carry: list[Value], carried: int) -> list[Value]:
        """A loop followed until its carry depends on nothing new."""
        joins, self.joins = self.joins, False
        while True:
            found = body(carry)
            joined = [_either(one, other) for one, other in zip(carry, found, strict=False)]
            if [(one.after, one.is_data) for one in joined] == [(one.after, one.is_data) for one in carry]:
                self.joins = joins
                return [*joined, *found[carried:]]
            carry = joined


def _either(one: Value, other: Value) -> Value:
    return Value(one.after | other.after, one.is_data or other.is_data, None, one.is_bent or other.is_bent, other.parts)


def _moved(equation: Any, shape: Sequence[int]) -> Callable[[Dims], Dims | None] | None:
    """How an operation moves the dims of its first operand, if that is all that it does."""
    name, params = equation.primitive.name, equation.params
    if name in RESHAPES:
        return lambda dims: reshaped(dims, shape)
    if name == "transpose":
        return lambda dims: tuple(dims[place] for place in params["permutation"])
    if name == "broadcast_in_dim":
        return lambda dims: spread(dims, params["broadcast_dimensions"], shape)
    if name in ("slice", "dynamic_slice", "rev", "convert_element_type", "copy"):
        return lambda dims: resized(dims, shape)
    return None
