"""A source: the checkpoint that is converted, as its headers describe it. Tensor data is never touched here.

`open_source` takes a directory with an index, a directory with one file, a file, or an index, and returns a frozen
table of tensors by name. Everything that can be wrong with it is found now, over all the files, and raised as one
report: a conversion of 163 files should not stop at the 162nd for want of a byte. What is odd but harmless becomes a
note.

There are two forms: safetensors, and what `torch.save` writes. Where a directory has both, they are the same weights by
the habit of those who publish them, and the safetensors are taken.

An index is authoritative where there is one: no directory is searched for more files, whatever lies beside it. Headers
are read by several threads, which hide the latency of a network disk. `Source` holds plain values: it goes into a plan,
through JSON and into workers.
"""

import difflib
import hashlib
import os
import re
import stat
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from shardconv.errors import InputError, Problem
from shardconv.formats import FileHeader
from shardconv.formats import SourceFile as SourceFile
from shardconv.formats import StoredTensor as StoredTensor
from shardconv.formats.index import listed, missing_files, parse_index, reconcile
from shardconv.formats.pytorch import read_torch
from shardconv.formats.safetensors import HEADER_LIMIT, read_header
from shardconv.formats.strict_json import AGAIN, read_object

CONFIG = "config.json"
# Headers in flight: enough to hide a network disk's latency of tens of milliseconds over 163 files. Parsing itself
# holds the interpreter's lock, so more threads do not help a local disk.
_THREADS = 8
# What a `num_hidden_layers` in config.json may stand under, for models with a vision tower.
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
_LAYER = re.compile(r"(?:model\.|language_model\.)*layers\.([0-9]{1,18})\.")
# What trainers leave beside the weights, in PyTorch's format too.
_NO_WEIGHTS = re.compile(r"(?:training_args|optimizer|scheduler|scaler|rng_state|random_states)[^/]*")


@dataclass(frozen=True, slots=True)
class _Form:
    """A format by the names of its files: what messages call it, the standard index and single file, and the suffixes."""

    format: str
    word: str
    index: str
    single: str
    suffixes: tuple[str, ...]

    def is_index(self, name: str) -> bool:
        return name.endswith(os.path.splitext(self.single)[1] + ".index.json")

    def is_file(self, name: str) -> bool:
        return name.endswith(self.suffixes)


_SAFETENSORS = _Form("safetensors", ".safetensors", "model.safetensors.index.json", "model.safetensors", (".safetensors",))
_PYTORCH = _Form("pytorch", "PyTorch", "pytorch_model.bin.index.json", "pytorch_model.bin", (".bin", ".pt", ".pth", ".ckpt"))
_FORMS = (_SAFETENSORS, _PYTORCH)


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint: its tensors by name, the files they lie in, its config.json if there is one, and what is odd.

    Two names may be one tensor's (same file, same bytes) where the checkpoint says that one was left out for the other, or
    stores both in one place. `prefix` is where in PyTorch files the tensors are, "" to find out.
    """

    root: str
    format: str
    tensors: Mapping[str, StoredTensor]
    files: Mapping[str, SourceFile]
    config: Mapping[str, object] | None
    notes: tuple[str, ...]
    prefix: str = ""

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


def open_source(path: str | os.PathLike[str], prefix: str = "") -> Source:
    """Read all headers of the checkpoint at `path`: a directory, a .safetensors file, a PyTorch file, or an index.

    `prefix` is the key of a PyTorch file's state dict, where it has several. Raises InputError with every problem of every
    file.
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
        form = next((form for form in _FORMS if form.is_index(entry) or form.is_file(entry)), None)
        if form is None:
            fact = f"{entry} is neither a .safetensors file, nor a PyTorch file, nor an index of such files"
            raise _stop(fact, "give a directory, a .safetensors file, a .bin or .pth file, or an index")
        if prefix and form is _SAFETENSORS:
            fact = f"source.prefix is {prefix!r}, and {entry} is safetensors, which keeps no tensors under a key"
            raise _stop(fact, 'set source.prefix = "auto"')
        source = (_from_index if form.is_index(entry) else _from_file)(root, entry, present, form, prefix)
    except InputError as error:
        raise InputError(title, error.problems) from error
    other = [name for name in (_PYTORCH.index, _PYTORCH.single) if name in present]
    if not wanted and form is _SAFETENSORS and other:
        source = replace(source, notes=(*source.notes, f"{other[0]} is left unread, since there are .safetensors files"))
    return source


def _entry(root: str, present: list[str]) -> str:
    """The name of the file to start from in a directory: an index, else the only model file."""
    for form in _FORMS:
        for standard in (form.index, form.single):
            if standard in present:
                return standard
        indices = sorted(name for name in present if form.is_index(name))
        files = sorted(name for name in present if form.is_file(name) and not _NO_WEIGHTS.fullmatch(name))
        if len(indices or files) == 1:
            return (indices or files)[0]
        if indices:
            fact = f"{root} has {len(indices)} indices and none is {form.index}: {listed(indices)}"
            raise _stop(fact, "give the path of one of them")
        if files:
            fact = f"{root} has {len(files)} {form.word} files and no index: {listed(files)}"
            raise _stop(fact, f"download {form.index} too, or give the path of one file")
    what = f"has neither .safetensors nor PyTorch files; it has {listed(sorted(present))}" if present else "is empty"
    raise _stop(f"{root} {what}", "give the directory that holds the weights")


def _stop(fact: str, remedy: str) -> InputError:
    return InputError(fact, [Problem(fact, remedy)])


def _no_such_path(path: str) -> InputError:
    """A path that is not there, with the nearest that is."""
    parent, name = os.path.split(path)
    if not os.path.isdir(parent):
        return _stop(f"{path} does not exist", "give a local path; to convert a model by its id, download it first")
    close = difflib.get_close_matches(name, os.listdir(parent), n=1)
    hint = f"did you mean {os.path.join(parent, close[0])}?" if close else f"check the path; {parent} exists"
    return _stop(f"{path} does not exist", hint)


def _from_file(root: str, name: str, present: list[str], form: _Form, prefix: str) -> Source:
    """A checkpoint in one file."""
    headers, problems = _headers(root, [name], prefix)
    config = _config(root, present, problems)
    if problems:
        raise InputError(f"{root} has problems", problems)
    header = headers[name]
    notes = []
    for index in sorted(file for file in present if form.is_index(file)):
        notes.append(f"only {name} is read, as asked; {index} beside it describes a checkpoint in several files")
    return _source(root, form, prefix, headers, header.tensors, header.aliases, config, notes)


def _from_index(root: str, name: str, present: list[str], form: _Form, prefix: str) -> Source:
    """A checkpoint in several files, as its index says."""
    index = parse_index(name, _read(root, name))
    problems = missing_files(index, present)
    there = set(present)
    headers, broken = _headers(root, [file for file in index.files if file in there], prefix)
    problems += broken
    config = _config(root, present, problems)
    tensors, wrong, notes = reconcile(index, headers, may_miss=lambda key: is_extra_layer(key, config))
    problems += wrong
    if problems:
        raise InputError(f"{root} has problems", problems)
    if form.single in present and form.single not in index.files:
        notes.append(f"{form.single} is left unread, since {name} does not name it")
    aliases = dict(index.aliases)
    for header in headers.values():
        aliases.update(header.aliases)
    return _source(root, form, prefix, headers, tensors, aliases, config, notes)


def _source(
    root: str,
    form: _Form,
    prefix: str,
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
    odd = (note for header in headers.values() for note in header.notes)
    return Source(root, form.format, named, files, config, (*notes, *odd), prefix)


def _header(root: str, name: str, prefix: str) -> FileHeader:
    """The header of a file of either form; an index only names files of its own form."""
    _require_file(root, name)
    return read_torch(root, name, prefix) if _PYTORCH.is_file(name) else read_header(root, name)


def _headers(root: str, names: list[str], prefix: str) -> tuple[dict[str, FileHeader], list[Problem]]:
    """Read headers in parallel: those that are good, and the problems of the others."""
    headers: dict[str, FileHeader] = {}
    problems: list[Problem] = []

    def attempt(name: str) -> FileHeader | InputError:
        try:
            return _header(root, name, prefix)
        except InputError as error:
            return error

    with ThreadPoolExecutor(_THREADS) as pool:
        for name, found in zip(names, pool.map(attempt, names), strict=True):
            if isinstance(found, InputError):
                problems += found.problems
            else:
                headers[name] = found
    return headers, problems


def _require_file(root: str, name: str) -> None:
    """Raise InputError where a name is of something that may be read without end; what else is wrong its reader says."""
    try:
        mode = os.stat(os.path.join(root, name)).st_mode
    except OSError:
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise _stop(f"{name} is a pipe, a socket or a device, not a file", "put it on a disk first")


def _read(root: str, name: str) -> bytes:
    _require_file(root, name)
    try:
        with open(os.path.join(root, name), "rb") as file:
            raw = file.read(HEADER_LIMIT + 1)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise _stop(f"{name} cannot be read: {error.strerror}", "check that it is a file that you may read") from error
    if len(raw) > HEADER_LIMIT:
        raise _stop(f"{name} has {size} bytes, over {HEADER_LIMIT}", AGAIN)
    return raw


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


def check_unchanged(source: Source, names: Iterable[str] | None = None) -> list[Problem]:
    """What changed in the source's files, or in those of these names, since their headers were read; one stat per file when nothing did."""
    problems = []
    for name in source.files if names is None else sorted(names):
        file = source.files[name]
        try:
            found = os.stat(os.path.join(source.root, name))
            if (found.st_size, found.st_mtime_ns) == (file.size, file.mtime_ns):
                continue
            if found.st_size != file.size:
                how = f"it had {file.size} bytes and has {found.st_size}"
            elif _header(source.root, name, source.prefix).file.header_digest != file.header_digest:
                how = "its header is another one"
            else:
                how = "it was written to; its size and header are the same"
            problems.append(Problem(f"{name} changed since it was planned: {how}", "plan again"))
        except OSError as error:
            problems.append(Problem(f"{name} cannot be read any more: {error.strerror}", "put it back, or plan again"))
        except InputError as error:
            problems += error.problems
    return problems
