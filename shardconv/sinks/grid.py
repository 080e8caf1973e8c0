"""The check before the commit: what was written is exactly the chunk grid of every array.

Orbax does not ask. It commits an empty directory without a word, it merges two databases that hold the same key in the
order in which the file system lists them, and of a lost chunk readers may make zeros. So the keys of all winning
databases together are compared with the keys that the arrays must have: each chunk exactly once, each array's metadata
at least once and as planned, and nothing else.

Problems are summed up by template: `layers.{}.w` stands for the same array of every layer. Keys alone are read; a 70B
checkpoint takes seconds.
"""

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import tensorstore as ts

from shardconv.errors import Problem
from shardconv.sinks.spec import (
    ArraySpec,
    Json,
    StoreOptions,
    array_spec,
    attempt_path,
    database_spec,
    metadata_key,
    stored_keys,
    zarr_metadata,
)

# Databases opened at a time: enough to keep a network disk busy, few enough not to run out of files.
_AT_A_TIME = 64
_CACHE_BYTES = 16 * 2**20
_EXAMPLES = 3
_RESTART = "run again with --restart: what is written does not belong to this plan"


@dataclass
class _Found:
    """What lies in the databases.

    Who holds each key; a holder of each text that an array's metadata has; why a database cannot be read.
    """

    holders: dict[str, list[str]]
    documents: dict[str, dict[bytes, str]]
    unreadable: dict[str, str]


def check_grid(stage: str, specs: Sequence[ArraySpec], attempts: Sequence[str], options: StoreOptions) -> list[Problem]:
    """Everything that is wrong with the winning attempts' databases, or, without OCDBT, with the stage's files.

    The list is empty if all is well.
    """
    context = ts.Context({"cache_pool#ocdbt": {"total_bytes_limit": _CACHE_BYTES}})
    if options.ocdbt:
        paths = [attempt_path(stage, attempt) for attempt in attempts]
        broken = [path for path in paths if not os.path.exists(f"{path}/manifest.ocdbt")]
        if broken:
            fact = f"{len(broken)} of {len(attempts)} unit databases are not there, such as {_some(broken)}"
            return [Problem(fact, "run again with --restart: they were removed after they had been written")]
        stores = [(attempt, database_spec(stage, attempt)) for attempt in attempts]
    else:
        stores = [("", {"driver": "file", "path": f"{stage}/"})]
    found = _read(stores, {metadata_key(spec, options) for spec in specs}, context)
    return [
        *_unreadable(stage, found),
        *_clashes(specs),
        *_missing(specs, found, options),
        *_doubles(specs, found, options),
        *_strangers(specs, found, options),
        *_other_metadata(stage, specs, found, options, context),
    ]


def _read(stores: Sequence[tuple[str, Json]], documents: Collection[str], context: ts.Context) -> _Found:
    """The keys of all databases, and the values of those that are array metadata."""
    found = _Found(defaultdict(list), defaultdict(dict), {})
    for attempt, opening in _opened(stores, context):
        try:
            store = opening.result()
            keys = [key.decode() for key in store.list().result()]
            read = {key: store.read(key) for key in keys if key in documents}
            texts = {key: reading.result().value for key, reading in read.items()}
        except (OSError, ValueError) as error:  # what TensorStore says of a file that is damaged or gone
            found.unreadable[attempt] = str(error).partition(" [tensorstore_spec")[0]
            continue
        for key in keys:
            found.holders[key].append(attempt)
        for key, text in texts.items():
            found.documents[key].setdefault(text, attempt)
    return found


def _opened(stores: Sequence[tuple[str, Json]], context: ts.Context) -> Iterator[tuple[str, ts.Future[ts.KvStore]]]:
    for start in range(0, len(stores), _AT_A_TIME):
        some = stores[start : start + _AT_A_TIME]
        yield from [(name, ts.KvStore.open(store, context=context)) for name, store in some]


def _unreadable(stage: str, found: _Found) -> Iterator[Problem]:
    if found.unreadable:
        attempt, why = min(found.unreadable.items())
        path = attempt_path(stage, attempt) if attempt else stage
        fact = f"{len(found.unreadable)} unit databases cannot be read, such as {path}\n{why}"
        yield Problem(fact, "run again with --restart, on a disk that keeps what it is given")


def _clashes(specs: Sequence[ArraySpec]) -> Iterator[Problem]:
    for name, count in Counter(spec.name for spec in specs).items():
        if count > 1:
            yield Problem(
                f"{name}: {count} arrays have this name",
                "rename one in the layout; Orbax joins the keys of a pytree with dots",
            )


def _missing(specs: Sequence[ArraySpec], found: _Found, options: StoreOptions) -> Iterator[Problem]:
    lost: dict[str, list[str]] = defaultdict(list)
    total: Counter[str] = Counter()
    for spec in specs:
        for key in stored_keys(spec, options):
            total[template(spec.name)] += 1
            if key not in found.holders:
                lost[template(spec.name)].append(key)
    for name, keys in lost.items():
        yield Problem(f"{name}: {len(keys)} of {total[name]} keys are missing, such as {_some(keys)}", _RESTART)


def _doubles(specs: Sequence[ArraySpec], found: _Found, options: StoreOptions) -> Iterator[Problem]:
    twice: dict[str, list[str]] = defaultdict(list)
    for spec in specs:
        for key in stored_keys(spec, options):
            if len(found.holders.get(key, ())) > 1 and key != metadata_key(spec, options):
                twice[template(spec.name)].append(key)
    for name, keys in twice.items():
        by = _some(sorted(found.holders[keys[0]]))
        fact = f"{name}: {len(keys)} chunks are written more than once, such as {keys[0]} (by {by})"
        yield Problem(fact, "keep one attempt of each unit")


def _strangers(specs: Sequence[ArraySpec], found: _Found, options: StoreOptions) -> Iterator[Problem]:
    expected = {key for spec in specs for key in stored_keys(spec, options)}
    strangers: dict[str, list[str]] = defaultdict(list)
    for key in sorted(found.holders.keys() - expected):
        strangers[template(key.partition("/")[0])].append(key)
    for name, keys in strangers.items():
        yield Problem(f"{name}: {len(keys)} keys belong to no array of the plan, such as {_some(keys)}", _RESTART)


def _other_metadata(
    stage: str,
    specs: Sequence[ArraySpec],
    found: _Found,
    options: StoreOptions,
    context: ts.Context,
) -> Iterator[Problem]:
    other: dict[str, list[str]] = defaultdict(list)
    for spec in specs:
        key = metadata_key(spec, options)
        for text, attempt in found.documents.get(key, {}).items():
            if json.loads(text) != zarr_metadata(spec, options) and not _opens(stage, attempt, spec, options, context):
                other[template(spec.name)].append(key)
    for name, keys in other.items():
        fact = f"{name}: the metadata of {len(keys)} arrays is not the planned one, such as {_some(keys)}"
        yield Problem(fact, _RESTART)


def _opens(stage: str, attempt: str, spec: ArraySpec, options: StoreOptions, context: ts.Context) -> bool:
    """Whether TensorStore finds that the metadata means the planned array, in whatever words it was written."""
    try:
        ts.open(array_spec(stage, attempt, spec, options), open=True, context=context).result()
    except ValueError:
        return False
    return True


def template(name: str) -> str:
    """The name with every number left open.

    >>> template("layers.12.mlp.w1/c/0/3")
    'layers.{}.mlp.w1/c/{}/{}'
    """
    return re.sub(r"(?<![A-Za-z])\d+", "{}", name)


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:_EXAMPLES]) + (", ..." if len(listed) > _EXAMPLES else "")
