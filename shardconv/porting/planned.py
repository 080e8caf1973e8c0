"""A plan for a layout of the user's own: the moves that fill a model's arrays, as transfers.

What an expression makes of tensors becomes a computed tensor, which is read like any other; a number that fills an array is one too, of no
inputs. Mesh rules go by the names of axes that the mapping has, and those that layer rules have: `o i h w` of a convolution.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from shardconv.coverage import rule_of
from shardconv.dtypes import dtype_named, dtype_of_code
from shardconv.formats import ComputedTensor
from shardconv.plan import Plan, PlanOptions, plan_transfers
from shardconv.porting.folding import FOLDS, Call, Expression, names, parsed
from shardconv.porting.making import Made, Target
from shardconv.porting.moves import Bound, bound
from shardconv.source import Source, StoredTensor
from shardconv.transfers import Transfer
from shardconv.values import is_float

MOVING = ("block_diagonal", "flip", "masked")  # functions whose results are numbers of the first argument, or zeros


def plan_made(source: Source, made: Made, layout: str, options: PlanOptions) -> Plan:
    """Plans what fills the arrays of the user's model; raises what `plan_transfers` raises."""
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    arrays = {name: target.shape for name, target in made.arrays.items()}
    sides = _Sides(source.tensors, made.arrays, options.dtype)
    moves = [bound(move, shapes, arrays) for move in made.moves]
    computed = {name: tensor for one in moves for name, tensor in sides.computed(one).items()}
    plan = plan_transfers(source, [sides.transfer(one) for one in moves], layout, options, computed=computed)
    return replace(plan, notes=(*source.notes, *_ignored(source.tensors, options.ignore), *made.notes, *plan.notes))


def named_axes(plan: Plan) -> set[str]:
    """The names of axes that mesh rules may speak of."""
    return {axis for leaf in plan.leaves for part in leaf.parts for axis in part.target.sizes}


@dataclass(frozen=True)
class _Sides:
    """The checkpoint's tensors and the model's arrays, and the dtype that the user wants: "source" or a name."""

    stored: Mapping[str, StoredTensor]
    arrays: Mapping[str, Target]
    dtype: str

    def transfer(self, one: Bound) -> Transfer:
        """A move as a transfer."""
        filled = [name for name, _ in one.target.keys()]
        return Transfer(
            param=one.move.source,
            source=one.source,
            target=one.target,
            template=".".join("{}" if part.isdigit() else part for part in self.arrays[filled[0]].path),
            axes=one.target.sizes,
            dtype=self._wanted(one.move.expression, self.arrays[filled[0]].dtype, one),
            exact=_moves(one.move.expression),
            paths={name: self.arrays[name].path for name in filled},
        )

    def _wanted(self, expression: Expression, own: str, one: Bound) -> str:
        """What is stored: of a number the array's own dtype, if no other is asked for, of an expression that of its tensor."""
        if isinstance(expression, float):
            return own if self.dtype == "source" or not is_float(dtype_named(own)) else self.dtype
        if isinstance(expression, Call) and self.dtype == "source":
            key = next(key for key, _ in one.source.keys())
            return dtype_of_code(self._code(parsed(key), widened=False)).name
        return self.dtype

    def computed(self, one: Bound) -> dict[str, ComputedTensor]:
        """The tensors of a move that no file has, by name."""
        if isinstance(one.move.expression, str):
            return {}
        own = dtype_named(self.arrays[next(name for name, _ in one.target.keys())].dtype).code
        found = {}
        for key, _ in one.source.keys():
            expression = parsed(key)
            code = own if isinstance(expression, float) else self._code(expression, widened=True)
            inputs = tuple(self.stored[name] for name in dict.fromkeys(names(expression)))
            found[key] = ComputedTensor(key, code, one.source.shape, inputs)
        return found

    def _code(self, expression: Expression, *, widened: bool) -> str:
        """The dtype of what an expression gives, as `folding` has it; not `widened`, that of the tensor whose shape it has."""
        if not isinstance(expression, Call):
            return self.stored[str(expression)].dtype
        code = self._code(expression.arguments[FOLDS[expression.function].like], widened=widened)
        narrow = dtype_of_code(code).numpy.itemsize < dtype_named("float32").numpy.itemsize
        return dtype_named("float32").code if widened and narrow and expression.function not in MOVING else code


def _moves(expression: Expression) -> bool:
    """Whether what an expression gives keeps every bit."""
    return not isinstance(expression, Call) or (expression.function in MOVING and _moves(expression.arguments[0]))


def _ignored(stored: Mapping[str, StoredTensor], rules: Sequence[str]) -> list[str]:
    """A note for each rule that leaves tensors out."""
    followed = [rule for name in stored if (rule := rule_of(name, rules))]
    return [f"{rule}: {followed.count(rule)} tensor{'' if followed.count(rule) == 1 else 's'} ignored" for rule in dict.fromkeys(followed)]
