"""Nothing missing: every stored tensor is used or ignored by a rule, every tensor that the family names is there, in its shape.

All that is wrong comes in one report, keys that follow one template in one line with their number, before any byte is written. What is
ignored is told too, in a note, so that no rule hides a tensor.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache

from shardconv.axes import DECIMAL, Address
from shardconv.errors import InputError, Problem
from shardconv.family import Family, Model, Param
from shardconv.formats import StoredTensor

TIED = "unembed"
# So many layers that no model needs are not told as rules to ignore them: it is the wrong config.json.
FEW = 4
# Names that are listed to be looked for: no model has so many tensors of one kind, and config.json may say 10^12 layers.
MOST = 1_000_000
ANOTHER = "use the config.json that belongs to this checkpoint"


def is_tied(model: Model, stored: Mapping[str, StoredTensor], equal: bool | None) -> bool:
    """Whether the model uses its embedding as output projection, by what is in the file.

    Absent where config.json says tied: tied. Present where it says not tied: not tied. Present where it says tied: `equal` decides, the
    outcome of comparing the two tensors; None, not compared yet, is taken as equal. Absent where config.json says not tied is no whole
    model, which `require_covered` reports.
    """
    param = next((param for param in model.params if param.name == TIED), None)
    if param is None or not model.says_tied:
        return False
    return param.key not in stored or equal is not False


def require_covered(
    model: Model, stored: Mapping[str, StoredTensor], tied: bool, ignored: Sequence[str]
) -> tuple[str, ...]:
    """Raises InputError with all that is missing, unmapped or of another shape; returns notes on what is ignored, by rule.

    `ignored` are the user's rules beside the family's: keys with `*` for any text and `{}` for any number.
    """
    problems: list[Problem] = []
    expected: set[str] = set()
    for param in {param.key: param for param in model.params}.values():
        if tied and param.name == TIED:
            expected.add(param.key)
            continue
        address = param.address(model.axes)
        if math.prod(address.named.values()) > MOST:
            problems.append(_too_many(param, address, model))
            continue
        keys = [key for key, _ in address.keys()]
        expected.update(keys)
        problems += _missing(param, [key for key in keys if key not in stored], len(keys), model)
        problems += _misshapen(param, address, [stored[key] for key in keys if key in stored], model)
    rest: dict[str, list[str]] = {"": []}
    for key in stored:
        if key not in expected:
            rest.setdefault(rule_of(key, (*model.family.ignore, *ignored)), []).append(key)
    unmapped = rest.pop("")
    beyond = _beyond(unmapped, model)
    problems = [*_more_layers(beyond, model), *problems, *_unmapped((key for key in unmapped if key not in beyond), model)]
    if problems:
        raise InputError(f"the {model.family.name} family does not describe this checkpoint", problems)
    return tuple(f"{_counted(rule, keys)} ignored" for rule, keys in rest.items())


def _too_many(param: Param, address: Address, model: Model) -> Problem:
    fact = f"{param.key} would be {math.prod(address.named.values())} tensors, over {MOST}"
    return Problem(fact, f"config.json gives {_sizes(address.named, model)}; {ANOTHER}")


def _counted(name: str, keys: Sequence[str]) -> str:
    return f"{name} ({len(keys)} tensors)" if len(keys) > 1 else f"{name} (1 tensor)"


def _missing(param: Param, keys: Sequence[str], expected: int, model: Model) -> list[Problem]:
    if not keys:
        return []
    count = f"{len(keys)} of {expected} tensors" if expected > 1 else "1 tensor"
    fact = f"{param.key} ({count}) is in the family, not in the checkpoint"
    if len(keys) < expected:
        fact += f"; the first is {keys[0]}"
    if param.name == TIED:
        said = model.config.get("tie_word_embeddings")
        fact += "; config.json has " + ("no tie_word_embeddings" if said is None else f"tie_word_embeddings = {json.dumps(said)}")
        return [Problem(fact, "if the embeddings are tied, set tie_word_embeddings to true there")]
    return [Problem(fact, "the download may be incomplete, or model.family is another")]


def _misshapen(param: Param, address: Address, tensors: Iterable[StoredTensor], model: Model) -> list[Problem]:
    wrong = [tensor for tensor in tensors if tensor.shape != address.shape]
    if not wrong:
        return []
    sizes = _sizes(re.findall(r"\w+", param.dims), model)
    more = f" ({len(wrong)} tensors)" if len(wrong) > 1 else ""
    fact = f"{wrong[0].name}{more} in {wrong[0].file} is {wrong[0].shape}, but [{param.dims}] is {address.shape}"
    return [Problem(fact, f"config.json gives {sizes}; {ANOTHER}")]


def _sizes(axes: Iterable[str], model: Model) -> str:
    return ", ".join(f"{axis} = {model.axes[axis]}" for axis in dict.fromkeys(axes) if axis in model.axes)


def rule_of(key: str, rules: Iterable[str]) -> str:
    """The first rule that a key follows, or nothing; in a rule, `*` is any text and `{}` any number.

    >>> rule_of("blocks.3.mask", ["rope.*", "blocks.{}.mask"])
    'blocks.{}.mask'
    """
    return next((rule for rule in rules if _pattern(rule).fullmatch(key)), "")


@lru_cache
def _pattern(rule: str) -> re.Pattern[str]:
    wild = {"*": ".*", "{}": "[0-9]+"}
    return re.compile("".join(wild.get(text) or re.escape(text) for text in re.split(r"(\*|\{\})", rule)))


def _beyond(keys: Iterable[str], model: Model) -> dict[str, int]:
    """The keys of layers that config.json does not have, with the number of the layer."""
    starts = {param.key.partition("{layers}")[0] for param in model.family.params if "{layers}" in param.key}
    found = {}
    for key in keys:
        for start in starts:
            number = key.removeprefix(start).partition(".")[0]
            if key.startswith(start) and re.fullmatch(DECIMAL, number) and int(number) >= model.axes["layers"]:
                found[key] = int(number)
    return found


def _more_layers(beyond: Mapping[str, int], model: Model) -> Iterator[Problem]:
    """All of them in one problem: one number in config.json is wrong, or these layers are not the model's."""
    if not beyond:
        return
    entry, has, layers = model.family.axes["layers"], max(beyond.values()) + 1, sorted(set(beyond.values()))
    name, first = entry if isinstance(entry, str) else "layers", next(iter(beyond))
    many = f"{len(beyond)} tensors are" if len(beyond) > 1 else "1 tensor is"
    fact = f"config.json has {name} = {model.axes['layers']}, which does not fit the {has} layers in the checkpoint: {many} beyond"
    prefix = first.partition(f".{beyond[first]}.")[0]
    rules = ", ".join(f'"{prefix}.{layer}.*"' for layer in layers)
    needless = f"; if the model does not need them, add {rules} to model.ignore" if len(layers) < FEW else ""
    yield Problem(f"{fact}; the first is {first}", f"{ANOTHER}, or set {name} = {has} in it{needless}")


def _unmapped(keys: Iterable[str], model: Model) -> Iterator[Problem]:
    """One problem for each template that the keys follow."""
    names = _numbers(model.family)
    found: dict[str, list[str]] = {}
    for key in keys:
        found.setdefault(_template(key, names), []).append(key)
    params = {param.key: param for param in model.family.params}
    for name, alike in found.items():
        rule = re.sub(r"{.*?}", "{}", name)
        remedy = f'if the model does not need {"them" if len(alike) > 1 else "it"}, add "{rule}" to model.ignore'
        yield Problem(f"{_counted(name, alike)} is in the checkpoint, {_why(params.get(name), alike[0], model)}", remedy)


def _why(param: Param | None, first: str, model: Model) -> str:
    """Why a tensor that follows this parameter's template, or none, is not in the model."""
    if param is None:
        return "not in the family"
    if param not in model.params:
        return f"but config.json does not have {param.when} = true"
    axes = re.findall(r"\w+", " ".join(re.findall(r"{(.*?)}", param.key)))
    return f"beyond what config.json gives, {_sizes(axes, model)}; the first is {first}"


def template(key: str, family: Family) -> str:
    """A key with its numbers replaced by what the family's own keys have in that place, or by `{}`.

    >>> from shardconv.families import families
    >>> template("model.layers.7.self_attn.q_proj.bias", families()["llama"])
    'model.layers.{layers}.self_attn.q_proj.bias'
    """
    return _template(key, _numbers(family))


def _numbers(family: Family) -> dict[tuple[str, ...], str]:
    """What the family's keys have where a number stands, by the words before it."""
    keys = [param.key.split(".") for param in family.params]
    return {_blank(words[:place]): word for words in keys for place, word in enumerate(words) if word.startswith("{")}


def _template(key: str, numbers: Mapping[tuple[str, ...], str]) -> str:
    words = key.split(".")
    return ".".join(
        numbers.get(_blank(words[:place]), "{}") if word.isdigit() else word for place, word in enumerate(words)
    )


def _blank(words: Sequence[str]) -> tuple[str, ...]:
    return tuple("{}" if word.isdigit() or word.startswith("{") else word for word in words)
