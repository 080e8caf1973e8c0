"""Layer rules: where a layer of PyTorch keeps its arrays, and where the same layer of a JAX library does.

A rule is a few moves between names inside one layer, such as `weight: o i h w -> h w i o` into `kernel`. The three libraries have a table
each (`linen`, `nnx`, `equinox`), from the name of a torch class to its rules. A class has several where the library has several layers
that compute the same; which one the model has shows in the names and shapes of its arrays.

Rules have no layers' sizes: these follow from the shapes. A row whose tensors a layer does not have (`bias=False`) is left out.
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property

from shardconv.porting.folding import Expression, names, parsed, renamed
from shardconv.porting.moves import Bound, Move, Shapes, bound
from shardconv.porting.sizes import ALL, shown

SPACE = {1: "w", 2: "h w", 3: "d h w"}  # the axes of a kernel in space


@dataclass(frozen=True, slots=True)
class Zero:
    """Term `part` of tensor `source` must be zeros, since the library has no place for it; `why` says what it is."""

    source: str
    dims: str
    part: int
    why: str


@dataclass(frozen=True)
class Rule:
    """A layer's moves. `form` names the one of several layers that compute the same; `unused` are tensors that no JAX layer needs.

    A `rare` one is meant only where torch's class is known, or the model's: by their shapes alone its tensors are usually another layer's.
    """

    rows: tuple[Move, ...]
    form: str = ""
    unused: tuple[str, ...] = ()
    zeros: tuple[Zero, ...] = ()
    rare: bool = False

    @cached_property
    def targets(self) -> frozenset[str]:
        """The names that its arrays have inside the JAX layer."""
        return frozenset(row.target for row in self.rows)

    @cached_property
    def known(self) -> frozenset[str]:
        """The names inside torch's layer that it speaks of."""
        return frozenset(self.unused).union(*(names(row.expression) for row in self.rows))


@dataclass(frozen=True)
class Table:
    """A library's rules by torch class. `classes` are the library's own, each with the torch classes that it can stand for; `lacks` says
    what the library cannot do, by torch class, or by class and tensor (`LSTM.weight_hr`)."""

    library: str
    rules: Mapping[str, tuple[Rule, ...]]
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    lacks: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def every(self) -> list[tuple[str, Rule]]:
        """All rules, each with the first torch class that has it."""
        return _once((kind, rule) for kind, rules in self.rules.items() for rule in rules)


@dataclass(frozen=True)
class Choice:
    """A rule that fits a layer, with the moves that it comes to."""

    kind: str
    rule: Rule
    layer: "Layer"
    moves: list[Bound]

    @property
    def name(self) -> str:
        """Its class and form, as a mapping says them: `ConvTranspose2d, transpose_kernel=True`."""
        return f"{self.kind}, {self.rule.form}" if self.rule.form else self.kind


@dataclass(frozen=True)
class Layer:
    """A layer of the checkpoint: its name, and for each name inside it (`weight`) what is stored, an expression.

    `kinds` are the names of its torch class and of those that it derives from; none where nobody knows.
    """

    name: str
    tensors: Mapping[str, Expression]
    kinds: tuple[str, ...] = ()


def same(names_there: str, names_here: str) -> tuple[Move, ...]:
    """Moves of arrays that are alike on both sides.

    >>> [str(row) for row in same("weight bias", "scale bias")]
    ['weight', 'bias']
    """
    return tuple(Move(there, ALL, here, ALL) for there, here in zip(names_there.split(), names_here.split(), strict=True))


def gates(source: str, dims: str, targets: str, to: str) -> tuple[Move, ...]:
    """One stored tensor with a term for each gate, an array for each of them."""
    return tuple(Move(source, dims, target, to, part) for part, target in enumerate(targets.split()))


def moves_of(rule: Rule, layer: Layer, arrays: Mapping[str, str], stack: str = "") -> list[Move]:
    """The rule's moves for this layer, with full names; `arrays` maps names inside the layer to names in the model.

    `stack` is an axis that the arrays have before all others, and the tensors in their names. A row stands for a layer that has all of its
    tensors; its array need not be there, which `bound` finds out.
    """
    found = []
    for row in rule.rows:
        needed = names(row.expression)
        if all(name in layer.tensors for name in needed):
            source = str(renamed(row.expression, layer.tensors)) if needed else row.source
            to = f"{stack} {row.to}".strip()
            found.append(Move(source, row.dims, arrays.get(row.target, row.target), to, row.part, row.into, row.sizes))
    return found


def used_by(rule: Rule, layer: Layer) -> set[str]:
    """The names inside a layer that the rule's rows read, or that it says are not needed."""
    rows = (names(row.expression) for row in rule.rows)
    found = {name for needed in rows if all(name in layer.tensors for name in needed) for name in needed}
    return found | {name for name in rule.unused if name in layer.tensors}


def fitting(
    rule: Rule, layer: Layer, arrays: Mapping[str, str], tensors: Shapes, model: Shapes, stack: str = ""
) -> list[Bound] | None:
    """The rule's moves with their addresses where it fits layer and arrays exactly: nothing is left on either side, and shapes agree.

    `arrays` may have others, of layers inside this one.
    """
    if not layer.tensors.keys() <= rule.known:
        return None
    mine = {arrays[inner] for inner in rule.targets if inner in arrays}
    scales = {inner for inner in arrays if "/" in inner and inner.partition("/")[0] in rule.targets}  # Flax's WeightNorm: of the same layer
    if not mine or not scales <= rule.targets or used_by(rule, layer) != set(layer.tensors):
        return None
    moves = moves_of(rule, layer, arrays, stack)
    if {move.target for move in moves} != mine:
        return None
    try:
        return [bound(move, tensors, model) for move in moves]
    except ValueError:
        return None


def rules_for(table: Table, layer: Layer, meant: Sequence[str] = ()) -> list[tuple[str, Rule]]:
    """The rules that may be meant, with torch's class: that of the layer, or all where it has none, as far as the model's can be it."""
    kind = next((kind for kind in layer.kinds if kind in table.rules), "")
    if not kind and not meant:
        return table.every
    kinds = [one for one in ([kind] if kind else table.rules) if not meant or one in meant]
    return _once((one, rule) for one in kinds for rule in table.rules[one])


def _once(rules: Iterable[tuple[str, Rule]]) -> list[tuple[str, Rule]]:
    """Rules with their classes; of those that are alike, the first."""
    found: dict[tuple[Move, ...], tuple[str, Rule]] = {}
    for kind, rule in rules:
        found.setdefault(rule.rows, (kind, rule))
    return list(found.values())


def choices(
    table: Table,
    views: Sequence[Layer],
    arrays: Mapping[str, str],
    tensors: Shapes,
    model: Shapes,
    meant: Sequence[str] = (),
    rare: bool = True,
    stack: str = "",
    seen: Set[str] = frozenset(),
) -> list[Choice]:
    """All that a layer's arrays may be filled by: the rules that fit it, in any of its views, and that do not all move the same.

    `meant` are the torch classes that the model's layer can stand for, if that is known. Where torch's is not, rare rules count only if no
    other fits, and, without `rare`, only for classes that are meant; but those of classes in `seen`, which the checkpoint is known or
    suspected to have, count as any other, and so do all for a class of the user's own, of which nobody knows what it does.
    """
    found: list[Choice] = []
    for view in views:
        for kind, rule in rules_for(table, view, meant):
            moves = fitting(rule, view, arrays, tensors, model, stack)
            if moves is not None and all(_addresses(moves) != _addresses(other.moves) for other in found):
                found.append(Choice(kind, rule, view, moves))
    usual = [choice for choice in found if not choice.rule.rare or choice.kind in seen]
    return found if views[0].kinds else usual or (found if rare or meant else [])


def _addresses(moves: Iterable[Bound]) -> list[str]:
    """What tells two lists of moves apart: their addresses, with axes by what they are and not by what they are called."""
    found = []
    for move in moves:
        numbers: dict[str, int] = {}
        sides = []
        for side in (move.target, move.source):
            digits = [(numbers.setdefault(d.axis, len(numbers)), d.size, d.radix, d.offset) for dim in side.dims for d in dim if d.size > 1]
            sides.append((side.name, side.shape, digits))
        found.append(repr(sides))
    return sorted(found)


def lacking(table: Table, layer: Layer) -> str:
    """What the library cannot do that this layer does, or nothing."""
    kind = next((kind for kind in layer.kinds if kind in table.rules), "")
    return next((why for key in (kind, *(f"{kind}.{inner}" for inner in layer.tensors)) if (why := table.lacks.get(key))), "")


def required_zeros(rule: Rule, layer: Layer) -> Iterable[tuple[Expression, Zero]]:
    """What must be zeros in this layer for the rule to be right."""
    return [(layer.tensors[zero.source], zero) for zero in rule.zeros if zero.source in layer.tensors]


def described(layer: Layer, tensors: Shapes) -> str:
    """A layer as a message has it: its class and its tensors.

    >>> described(Layer("fc", {"weight": "fc.weight"}, ("Linear",)), {"fc.weight": (4, 3)})
    'fc (Linear: weight (4, 3))'
    """
    parts = [f"{name} {_shapes(tensors, expression)}" for name, expression in layer.tensors.items()]
    return f"{layer.name or 'the model'} ({layer.kinds[0] + ': ' if layer.kinds else ''}{', '.join(parts)})"


def _shapes(tensors: Shapes, expression: Expression) -> str:
    return " and ".join(shown(tensors[name]) for name in names(expression))


def spatial(rank: int, rows: Sequence[tuple[str, str, str, str]]) -> tuple[Move, ...]:
    """Moves of a kernel with `rank` dims in space, which `*` stands for in dims, and `1*` for as many ones."""
    space, ones = SPACE[rank], " ".join("1" * rank)
    spelt = [(source, dims, target, to.replace("1*", ones).replace("*", space)) for source, dims, target, to in rows]
    return tuple(Move(source, dims.replace("*", space), target, to) for source, dims, target, to in spelt)


def checked(table: Table) -> Table:
    """The table, when all its expressions can be read; ValueError otherwise."""
    for rules in table.rules.values():
        for rule in rules:
            for row in rule.rows:
                parsed(row.source)
    return table
