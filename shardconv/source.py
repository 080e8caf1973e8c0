"""A source: the checkpoint that is converted, as its headers describe it. Tensor data is never touched here.

`open_source` takes a directory with an index, a directory with one file, a file, or an index, and returns a frozen
table of tensors by name. Everything that can be wrong with it is found now, over all the files, and raised as one
report: a conversion of 163 files should not stop at the 162nd for want of a byte. What is odd but harmless becomes a
note.

An index is authoritative where there is one: no directory is searched for more files, whatever lies beside it. Headers
are read by several threads, which hide the latency of a network disk. `Source` holds plain values: it goes into a plan,
through JSON and into workers.
"""

import difflib
import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from shardconv.errors import InputError, Problem
from shardconv.formats import SourceFile as SourceFile
from shardconv.formats import StoredTensor as StoredTensor
from shardconv.formats.index import listed, missing_files, parse_index, reconcile
from shardconv.formats.safetensors import FileHeader, read_header
from shardconv.formats.strict_json import read_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
_INDEX_SUFFIX = ".safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".bin.index.json")
# Headers in flight: enough to hide a network disk's latency of tens of milliseconds over 163 files. Parsing itself
# holds the interpreter's lock, so more threads do not help a local disk.
_THREADS = 8
# What a `num_hidden_layers` in config.json may stand under, for models with a vision tower.
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
_LAYER = re.compile(r"(?:model\.|language_model\.)*layers\.([0-9]+)\.")


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint: its tensors by name, the files they lie in, its config.json if there is one, and what is odd.

    Two names may be one tensor's (same file, same bytes) where the checkpoint says that one was left out for the other.
    """

    root: str
    format: str
    tensors: Mapping[str, StoredTensor]
    files: Mapping[str, SourceFile]
    config: Mapping[str, object] | None
    notes: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        """The bytes of all tensors, those with two names once."""
        return sum(nbytes for _, _, nbytes in {(t.file, t.offset, t.nbytes) for t in self.tensors.values()})

    def fingerprint(self) -> str:
        """A hex digest of the files' names, sizes and headers, which a copy elsewhere shares."""
        digest = hashlib.blake2b(digest_size=16)
        for name, file in sorted(self.files.items()):
            digest.update(f"{name}\0{file.size}\0{file.header_digest}\n".encode())
        return digest.hexdigest()


def open_source(path: str | os.PathLike[str]) -> Source:
    """Read all headers of the checkpoint at `path`: a directory, a .safetensors file, or an index.

    Raises InputError with every problem of every file.
    """
    path = os.path.abspath(path)
    title = f"{path} cannot be read as a checkpoint"
    try:
        if os.path.isdir(path):
            root, present, wanted = path, os.listdir(path), ""
        else:
            root, wanted = os.path.split(path)
            present = os.listdir(root) if os.path.exists(path) else []
    except OSError as error:
        raise InputError(title, [Problem(f"{path} cannot be listed: {error.strerror}")]) from error
    try:
        if wanted and not present:
            raise _no_such_path(path)
        entry = wanted or _entry(root, present)
        if entry.endswith(_INDEX_SUFFIX):
            return _from_index(root, entry, present)
        if entry.endswith(".safetensors"):
            return _from_file(root, entry, present)
        raise _stop(*_not_ours(entry))
    except InputError as error:
        raise InputError(title, error.problems) from error


def _entry(root: str, present: list[str]) -> str:
    """The name of the file to start from in a directory: an index, else the only model file."""
    for standard in (INDEX, SINGLE):
        if standard in present:
            return standard
    indices = sorted(name for name in present if name.endswith(_INDEX_SUFFIX))
    files = sorted(name for name in present if name.endswith(".safetensors"))
    if len(indices or files) == 1:
        return (indices or files)[0]
    if indices:
        fact = f"{root} has {len(indices)} indices and none is {INDEX}: {listed(indices)}"
        raise _stop(fact, "give the path of one of them")
    if files:
        fact = f"{root} has {len(files)} .safetensors files and no index: {listed(files)}"
        raise _stop(fact, f"download {INDEX} too, or give the path of one file")
    pickles = sorted(name for name in present if name.endswith(_PICKLES))
    if pickles:
        raise _stop(*_not_ours(pickles[0]))
    fact = f"{root} has no .safetensors files; it has {listed(sorted(present))}" if present else f"{root} is empty"
    raise _stop(fact, "give the directory that holds the .safetensors files")


def _stop(fact: str, remedy: str) -> InputError:
    return InputError(fact, [Problem(fact, remedy)])


def _not_ours(name: str) -> tuple[str, str]:
    """Why a file that is there is not read, and what to do."""
    if name.endswith(_PICKLES):
        fact = f"{name}: PyTorch .bin files are not read yet; shardconv reads .safetensors"
        return fact, "download the .safetensors files, or load and save the model with transformers, which writes them"
    fact = f"{name} is neither a .safetensors file nor an index ({INDEX})"
    return fact, "give a directory, a .safetensors file or an index"


def _no_such_path(path: str) -> InputError:
    """A path that is not there, with the nearest that is."""
    parent, name = os.path.split(path)
    if not os.path.isdir(parent):
        return _stop(f"{path} does not exist", "give a local path; to convert a model by its id, download it first")
    close = difflib.get_close_matches(name, os.listdir(parent), n=1)
    hint = f"did you mean {os.path.join(parent, close[0])}?" if close else f"check the path; {parent} exists"
    return _stop(f"{path} does not exist", hint)


def _from_file(root: str, name: str, present: list[str]) -> Source:
    """A checkpoint in one file."""
    headers, problems = _headers(root, [name])
    config = _config(root, present, problems)
    if problems:
        raise InputError(f"{root} has problems", problems)
    header = headers[name]
    notes = []
    for index in sorted(file for file in present if file.endswith(_INDEX_SUFFIX)):
        notes.append(f"only {name} is read, as asked; {index} beside it describes a checkpoint in several files")
    return _source(root, headers, header.tensors, header.aliases, config, notes)


def _from_index(root: str, name: str, present: list[str]) -> Source:
    """A checkpoint in several files, as its index says."""
    index = parse_index(name, _read(root, name))
    problems = missing_files(index, present)
    there = set(present)
    headers, broken = _headers(root, [file for file in index.files if file in there])
    problems += broken
    config = _config(root, present, problems)
    tensors, wrong, notes = reconcile(index, headers, may_miss=lambda key: is_extra_layer(key, config))
    problems += wrong
    if problems:
        raise InputError(f"{root} has problems", problems)
    if SINGLE in present and SINGLE not in index.files:
        notes.append(f"{SINGLE} is left unread, since {name} does not name it")
    aliases = dict(index.aliases)
    for header in headers.values():
        aliases.update(header.aliases)
    return _source(root, headers, tensors, aliases, config, notes)


def _source(
    root: str,
    headers: Mapping[str, FileHeader],
    tensors: Mapping[str, StoredTensor],
    aliases: Mapping[str, str],
    config: Mapping[str, object] | None,
    notes: Iterable[str],
) -> Source:
    named = dict(tensors)
    for alias, kept in aliases.items():
        if kept in tensors and alias not in tensors:
            named[alias] = replace(tensors[kept], name=alias)
    files = {file: header.file for file, header in headers.items()}
    return Source(root, "safetensors", named, files, config, tuple(notes))


def _headers(root: str, names: list[str]) -> tuple[dict[str, FileHeader], list[Problem]]:
    """Read headers in parallel: those that are good, and the problems of the others."""
    headers: dict[str, FileHeader] = {}
    problems: list[Problem] = []

    def attempt(name: str) -> FileHeader | InputError:
        try:
            return read_header(root, name)
        except InputError as error:
            return error

    with ThreadPoolExecutor(_THREADS) as pool:
        for name, found in zip(names, pool.map(attempt, names), strict=True):
            if isinstance(found, InputError):
                problems += found.problems
            else:
                headers[name] = found
    return headers, problems


def _read(root: str, name: str) -> bytes:
    try:
        with open(os.path.join(root, name), "rb") as file:
            return file.read()
    except OSError as error:
        raise _stop(f"{name} cannot be read: {error.strerror}", "check that it is a file that you may read") from error


def _config(root: str, present: list[str], problems: list[Problem]) -> Mapping[str, object] | None:
    """config.json if it is there; what is wrong with it is added to `problems`."""
    if CONFIG not in present:
        return None
    try:
        return read_object(_read(root, CONFIG), what=CONFIG, at=0)
    except InputError as error:
        problems += error.problems
        return None


def is_extra_layer(key: str, config: Mapping[str, object] | None) -> bool:
    """Whether a tensor belongs to a multi-token-prediction layer, which a model is whole without.

    Such layers are named so, or numbered from config.json's num_hidden_layers up.

    >>> config = {"num_hidden_layers": 61}
    >>> is_extra_layer("model.layers.61.eh_proj.weight", config), is_extra_layer("model.layers.60.mlp.up", config)
    (True, False)
    >>> is_extra_layer("mtp.fc.weight", None)
    True
    """
    if "mtp" in key.split("."):
        return True
    numbered = _LAYER.match(key)
    configs = [config or {}, *(inner for name in _TEXT_CONFIGS if isinstance(inner := (config or {}).get(name), dict))]
    counts = [count for c in configs if isinstance(count := c.get("num_hidden_layers"), int)]
    return numbered is not None and bool(counts) and int(numbered[1]) >= counts[0]


def check_unchanged(source: Source) -> list[Problem]:
    """What changed in the source's files since their headers were read; costs one stat per file when nothing did."""
    problems = []
    for name, file in source.files.items():
        try:
            stat = os.stat(os.path.join(source.root, name))
            if (stat.st_size, stat.st_mtime_ns) == (file.size, file.mtime_ns):
                continue
            if stat.st_size != file.size:
                how = f"it had {file.size} bytes and has {stat.st_size}"
            elif read_header(source.root, name).file.header_digest != file.header_digest:
                how = "its header is another one"
            else:
                how = "it was written to; its size and header are the same"
            problems.append(Problem(f"{name} changed since it was planned: {how}", "plan again"))
        except OSError as error:
            problems.append(Problem(f"{name} cannot be read any more: {error.strerror}", "put it back, or plan again"))
        except InputError as error:
            problems += error.problems
    return problems
