"""Nothing missing: every stored tensor is used or ignored by a rule, every tensor that the family names is there, in its shape.

All that is wrong comes in one report, keys that follow one template in one line with their number, before any byte is written.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from shardconv.axes import Address
from shardconv.errors import InputError, Problem
from shardconv.family import Family, Model, Param
from shardconv.formats import StoredTensor

TIED = "unembed"


def is_tied(model: Model, stored: Mapping[str, StoredTensor], equal: bool | None) -> bool:
    """Whether the model uses its embedding as output projection, by what is in the file.

    Absent where config.json says tied: tied. Present where it says not tied: not tied. Present where it says tied: `equal` decides, the
    outcome of comparing the two tensors; None, not compared yet, is taken as equal.
    """
    param = next((param for param in model.params if param.name == TIED), None)
    if param is None or not model.config.get("tie_word_embeddings", model.family.tied_by_default):
        return False
    return param.key not in stored or equal is not False


def require_covered(model: Model, stored: Mapping[str, StoredTensor], tied: bool, ignored: Sequence[str]) -> None:
    """Raises InputError with all that is missing, unmapped or of another shape."""
    problems: list[Problem] = []
    expected: set[str] = set()
    fields = {param.name: param.address(model.axes) for param in model.params}
    for param in model.params:
        if tied and param.name == TIED:
            expected.add(param.key)
            continue
        keys = [key for key, _ in fields[param.name].keys()]
        expected.update(keys)
        problems += _missing(param, [key for key in keys if key not in stored], len(keys), model)
        problems += _misshapen(param, fields[param.name], [stored[key] for key in keys if key in stored], model)
    unknown = [key for key in stored if key not in expected]
    problems += _unmapped(_not_ignored(unknown, model.family, ignored), model.family)
    if problems:
        raise InputError(f"the {model.family.name} family does not describe this checkpoint", problems)


def _missing(param: Param, keys: Sequence[str], expected: int, model: Model) -> list[Problem]:
    if not keys:
        return []
    count = f"{len(keys)} of {expected} tensors" if expected > 1 else "1 tensor"
    fact = f"{param.key} ({count}) is in the family, not in the checkpoint"
    if 0 < len(keys) < expected:
        fact += f"; the first is {keys[0]}"
    if param.name == TIED:
        return [Problem(fact + "; config.json has tie_word_embeddings = false", "if the embeddings are tied, set tie_word_embeddings to true there")]
    return [Problem(fact, "the download may be incomplete, or model.family is another")]


def _misshapen(param: Param, address: Address, tensors: Iterable[StoredTensor], model: Model) -> list[Problem]:
    wrong = [tensor for tensor in tensors if tensor.shape != address.shape]
    if not wrong:
        return []
    axes = {digit.group: model.axes[digit.group] for dim in address.dims for digit in dim if digit.group in model.axes}
    sizes = ", ".join(f"{axis} = {size}" for axis, size in axes.items())
    more = f" ({len(wrong)} tensors)" if len(wrong) > 1 else ""
    fact = f"{wrong[0].name}{more} in {wrong[0].file} is {wrong[0].shape}, but [{param.dims}] is {address.shape}"
    return [Problem(fact, f"config.json gives {sizes}; use the one that belongs to this checkpoint")]


def _not_ignored(keys: Iterable[str], family: Family, ignored: Sequence[str]) -> list[str]:
    rules = [rule.replace("{}", "*") for rule in (*family.ignore, *ignored)]
    return [key for key in keys if not any(fnmatchcase(key, rule) for rule in rules)]


def _unmapped(keys: Iterable[str], family: Family) -> list[Problem]:
    counts = Counter(template(key, family) for key in keys)
    return [
        Problem(
            f"{name} ({count} tensor{'s' if count > 1 else ''}) is in the checkpoint, not in the family",
            f'if the model does not need it, add "{re.sub(r"{.*?}", "*", name)}" to model.ignore',
        )
        for name, count in counts.items()
    ]


def template(key: str, family: Family) -> str:
    """A key with its numbers replaced by the axes that the family's own keys have in that place, or by `{}`.

    >>> from shardconv.families import families
    >>> template("model.layers.7.self_attn.q_proj.bias", families()["llama"])
    'model.layers.{layers}.self_attn.q_proj.bias'
    """
    prefixes = {tuple(_blank(param.key).split(".")): param.key.split(".") for param in family.params}
    parts, out = _blank(key).split("."), key.split(".")
    for place, part in enumerate(parts):
        if part == "{}":
            known = (words[place] for blank, words in prefixes.items() if blank[: place + 1] == tuple(parts[: place + 1]))
            out[place] = next(known, "{}")
    return ".".join(out)


def _blank(key: str) -> str:
    return ".".join("{}" if part.isdigit() or part.startswith("{") else part for part in key.split("."))
