"""Families: one file each, found by being here. `docs/adding_a_family.md` tells how to add one."""

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache

from shardconv.errors import InputError, Problem
from shardconv.family import Family


@cache
def families() -> Mapping[str, Family]:
    """All families by name.

    >>> families()["llama"].architectures
    ('LlamaForCausalLM',)
    """
    modules = (importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__))
    return {family.name: family for family in sorted((module.FAMILY for module in modules), key=lambda f: str(f.name))}


def find(config: Mapping[str, object], name: str = "auto") -> Family:
    """The family of a checkpoint: by name, or by the architecture in its config.json; raises InputError that lists what there is."""
    known = families()
    if name != "auto":
        if name in known:
            return known[name]
        raise InputError(f"there is no family {name!r}", [Problem(f"known: {', '.join(known)}", "set model.family to one of these")])
    architectures = config.get("architectures")
    wanted = [str(item) for item in architectures] if isinstance(architectures, list) else []
    for family in known.values():
        if set(wanted) & set(family.architectures):
            return family
    said = ", ".join(wanted) or "no architecture"
    listed = ", ".join(f"{family.name} ({', '.join(family.architectures)})" for family in known.values())
    raise InputError(
        f"no family describes this checkpoint: its config.json says {said}",
        [Problem(f"known: {listed}", "set model.family, or add a table: docs/adding_a_family.md")],
    )
