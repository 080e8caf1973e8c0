"""The index of a checkpoint in several files, and whether the files agree with it.

`{"metadata": {"total_size": bytes}, "weight_map": {tensor: file}}` says which file holds each tensor. The index is
authoritative: files that it does not name are never opened, and a tensor that stands in two files is taken from the one
that the index says. Files get mixed up in practice (a partial download, an overlay of two repositories, a stale shard),
and readers that take whatever they find load wrong weights without a word, so every disagreement is said:

    an error   a file that is not there; a tensor mapped to the wrong file; a tensor that no file has
    a note     a tensor in two files, or in a file and not in the index; a wrong total_size; a tensor that no file has
               and that the model is whole without

Names come from somebody else: a file name in an index may only be a plain name in the same directory.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from shardconv.errors import InputError, Problem
from shardconv.formats import FileHeader, StoredTensor
from shardconv.formats.strict_json import AGAIN, few, read_object, unprintable

# Names after which a list in a message says "and N more": a line or two of a terminal.
_NAMES_SHOWN = 5
_ONE_REVISION = "download the index and its files again, all from one revision"
_WRONG_FILE = "{index} maps {tensors} to {file}, but {they} in {others}"
_NOWHERE = "{index} maps {tensors} to {file}, but no file has {them}"
_TWICE = "{index} maps {tensors} to {file}, so what has the same name in {others} is left unused"
_UNNAMED = "{index} does not name {tensors} of {file}, left unused"

# (the file in question, other files) -> the tensors that a message is about
_Groups = dict[tuple[str, str], list[str]]


@dataclass(frozen=True, slots=True)
class Index:
    """A parsed index: its files, the file of each tensor, the bytes it claims in all, and aliases.

    An alias is a name left out for an equal tensor (alias -> kept).
    """

    name: str
    files: tuple[str, ...]
    weight_map: dict[str, str]
    total_size: int | None
    aliases: dict[str, str]


def parse_index(name: str, raw: bytes) -> Index:
    """Parse the index file `name`; InputError with every problem of it. Pure."""
    parsed = read_object(raw, what=name, at=0)
    weight_map, metadata = parsed.get("weight_map"), parsed.get("metadata")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise InputError(f"{name} cannot be read", [Problem(f"{name} has no weight_map from tensors to files", AGAIN)])
    files = tuple(sorted(set(weight_map.values())))
    problems = list(_file_name_problems(name, files))
    problems += [Problem(f"{name}: {unprintable(key)}", AGAIN) for key in weight_map if not key or not key.isprintable()]
    if problems:
        raise InputError(f"{name} cannot be read", few(name, problems))
    metadata = metadata if isinstance(metadata, dict) else {}
    total = metadata.get("total_size")
    # writers that drop one of two shared tensors say so here when there are several files, else in the file's header
    aliases = {k: v for k, v in metadata.items() if isinstance(v, str) and v in weight_map and k not in weight_map}
    if isinstance(total, float) and not math.isfinite(total):  # 1e999 is JSON
        total = None
    return Index(name, files, weight_map, int(total) if isinstance(total, int | float) else None, aliases)


def _file_name_problems(name: str, files: Iterable[str]) -> Iterator[Problem]:
    suffix = os.path.splitext(name.removesuffix(".index.json"))[1]
    for file in files:
        if not file or file in (".", "..") or "/" in file or "\\" in file or not file.isprintable():
            fact = f"{name} maps tensors to {file!r}, which is not the name of a file in the same directory"
            yield Problem(fact, "an index may only name files beside it; do not trust this one")
        elif not file.endswith(suffix):
            fact = f"{name} maps tensors to {file}, which is not a {suffix} file"
            yield Problem(fact, f"give the index of the {suffix} files")


def missing_files(index: Index, present: Iterable[str]) -> list[Problem]:
    """One problem that names all the index's files that are not among the `present` names; or none."""
    missing = sorted(set(index.files) - set(present))
    if not missing:
        return []
    fact = f"{len(missing)} of the {len(index.files)} files that {index.name} names are missing: {listed(missing)}"
    return [Problem(fact, "download them; a file may still be on its way")]


def reconcile(
    index: Index,
    headers: Mapping[str, FileHeader],
    *,
    may_miss: Callable[[str], bool],
) -> tuple[dict[str, StoredTensor], list[Problem], list[str]]:
    """The tensors that the index and the files agree on, what is wrong, and what is worth a note; pure.

    `headers` are those that could be read; tensors mapped to other files are passed over, since those files have a
    problem of their own. `may_miss` says of a tensor that no file has whether that is allowed.
    """
    tensors: dict[str, StoredTensor] = {}
    absent: list[str] = []
    for key, file in index.weight_map.items():
        if file in headers:
            if (tensor := headers[file].tensors.get(key)) is not None:
                tensors[key] = tensor
            else:
                absent.append(key)
    elsewhere: dict[str, list[str]] = {}  # the files that have a tensor which the index does not look for there
    for file, header in sorted(headers.items()):
        for key, tensor in header.tensors.items():
            if tensors.get(key) is not tensor:
                elsewhere.setdefault(key, []).append(file)
    wrong: _Groups = {}
    nowhere: _Groups = {}
    allowed: _Groups = {}
    for key in absent:
        others = " and ".join(elsewhere.get(key, ()))
        group = wrong if others else allowed if may_miss(key) else nowhere
        group.setdefault((index.weight_map[key], others), []).append(key)
    facts = [*_sentences(_WRONG_FILE, index, wrong), *_sentences(_NOWHERE, index, nowhere)]
    notes = [*_sentences(_NOWHERE, index, allowed), *_notes_on_surplus(index, elsewhere, tensors)]
    size = sum(tensor.nbytes for tensor in tensors.values())
    once = sum(nbytes for _, _, nbytes in {(t.file, t.offset, t.nbytes) for t in tensors.values()})
    # writers differ in whether two names of one tensor count twice
    if len(tensors) == len(index.weight_map) and index.total_size not in (None, size, once):
        notes.append(f"{index.name} says total_size {index.total_size}, but its tensors have {size} bytes")
    return tensors, [Problem(fact, _ONE_REVISION) for fact in facts], notes


def _notes_on_surplus(
    index: Index,
    elsewhere: Mapping[str, list[str]],
    tensors: Mapping[str, StoredTensor],
) -> Iterator[str]:
    """What the files have and nobody uses."""
    twice: _Groups = {}
    unnamed: _Groups = {}
    for key, files in elsewhere.items():
        if key in tensors:
            twice.setdefault((tensors[key].file, " and ".join(files)), []).append(key)
        else:  # it is not in the index at all: a tensor that the index looks for in another file is a problem already
            unnamed.setdefault((" and ".join(files), ""), []).append(key)
    yield from _sentences(_TWICE, index, twice)
    yield from _sentences(_UNNAMED, index, unnamed)


def _sentences(form: str, index: Index, groups: _Groups) -> Iterator[str]:
    """A sentence for each group of tensors that share a fate, with their number and the first few names."""
    for (file, others), keys in groups.items():
        one = len(keys) == 1
        count = "1 tensor" if one else f"{len(keys)} tensors"
        words = {"they": "it is" if one else "they are", "them": "it" if one else "them"}
        yield f"{form.format(index=index.name, tensors=count, file=file, others=others, **words)}: {listed(keys)}"


def listed(names: list[str]) -> str:
    """The first few names, and how many more there are.

    >>> listed(["a", "b"]), listed(list("abcdefgh"))
    ('a, b', 'a, b, c, d, e and 3 more')
    """
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
