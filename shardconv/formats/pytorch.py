"""Reading what `torch.save` wrote: every tensor's dtype, shape and byte range, without PyTorch and without its data.

A file is a zip archive. `<archive>/data.pkl` is a pickle in which each tensor is a view (offset, size, stride) of a numbered storage, and
`<archive>/data/<number>` is that storage, not compressed. So a contiguous view is a range of the file, and is read like any other; two
names for one view, as tied weights are saved, are two names for one range. The pickle is read by `unpickling`, which runs nothing of it.

What is not a row-major range is refused, with what to type: transposed, expanded and sliced views, compressed archives, the other byte
order. So is what was written before PyTorch 1.6, which is no zip.

Training checkpoints keep the state dict under a key, beside the optimizer and counters; `prefix` says which, and where only one entry has
tensors it need not. Wrappers leave marks in the names, which are taken off: `module.` before all of them, `_orig_mod.` anywhere.
"""

import hashlib
import math
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from shardconv.dtypes import dtype_of_code
from shardconv.errors import InputError, Problem
from shardconv.formats import FileHeader, SourceFile, StoredTensor
from shardconv.formats.index import listed
from shardconv.formats.pickled import PickledTensor
from shardconv.formats.safetensors import LFS_POINTER, SIZE_LIMIT
from shardconv.formats.strict_json import AGAIN, few
from shardconv.formats.unpickling import unpickle
from shardconv.formats.zip_directory import Directory, Member, data_offset, read_directory

# 100k tensors take 20 MB.
PICKLE_LIMIT = 100_000_000
# What a pickle of before PyTorch 1.6 begins with: its protocol, and a magic number of ten bytes.
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
_PICKLE = "/data.pkl"
# Names that wrappers of modules put between the parts of a parameter's name: torch.compile, FSDP, activation checkpointing.
_WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
_PARALLEL = "module."
_SAVE = 'in Python: import torch; torch.save(torch.load("{file}", weights_only=True), "{file}")'
_PLAIN = "save it anew as plain tensors: torch.save({name: tensor.contiguous() for name, tensor in state_dict.items()}, PATH)"

_NAME = 120  # characters of a name that a message shows

Tree = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class _Archive:
    """An open file: its members, and their names' common beginning."""

    file: str
    descriptor: int
    directory: Directory
    prefix: str

    def member(self, name: str) -> Member | None:
        return self.directory.members.get(self.prefix + name)

    def read(self, member: Member) -> bytes:
        """The bytes of a stored member; InputError where they are not those that were written."""
        at = data_offset(self.file, self.descriptor, self.directory, member)
        raw = os.pread(self.descriptor, member.nbytes, at)
        # PyTorch writes zero where it is told not to compute checksums
        if len(raw) != member.nbytes or (member.crc and zlib.crc32(raw) != member.crc):
            raise _broken(self.file, f"is damaged: the checksum of {member.name} is not that of its bytes", AGAIN)
        return raw


def read_torch(root: str, name: str, prefix: str) -> FileHeader:
    """Read and check the directory and the pickle of `root/name`; InputError with every problem of this file.

    `prefix` is where in the file the state dict is ("model"), "" to find out.
    """
    try:
        with open(os.path.join(root, name), "rb", buffering=0) as file:
            stat = os.fstat(file.fileno())
            _require_zip(name, os.pread(file.fileno(), 512, 0))
            archive = _archive(name, file.fileno(), read_directory(name, file.fileno(), stat.st_size))
            pickle = _pickle(archive)
            state, notes = _state_dict(name, unpickle(name, pickle), prefix)
            tensors = _tensors(archive, state)
    except OSError as error:
        remedy = AGAIN if isinstance(error, FileNotFoundError) else "check that it is a file that you may read"
        raise _broken(name, f"cannot be read: {error.strerror}", remedy) from error
    digest = hashlib.blake2b(archive.directory.raw + pickle, digest_size=16).hexdigest()
    return FileHeader(SourceFile(name, stat.st_size, stat.st_mtime_ns, digest), tensors, {}, notes)


def _broken(file: str, fact: str, remedy: str) -> InputError:
    return InputError(f"{file} cannot be read", [Problem(f"{file} {fact}", remedy)])


def _require_zip(file: str, head: bytes) -> None:
    """Raise InputError with what the file is where it is no zip."""
    if head.startswith(b"PK\3\4"):
        return
    if not head:
        raise _broken(file, "is empty", AGAIN)
    if head.startswith(LFS_POINTER):
        raise _broken(file, "is a Git LFS pointer, not the weights", "fetch them: git lfs pull")
    if head.startswith(_LEGACY):
        raise _broken(file, "has the format of before PyTorch 1.6, which is not read", "write it anew, " + _SAVE.format(file=file))
    if head[257:262] == b"ustar":
        raise _broken(file, "is a tar archive, as PyTorch 0.1 wrote, which is not read", "write it anew, " + _SAVE.format(file=file))
    if head.startswith((b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5")):
        raise _broken(file, "is a bare pickle, not what torch.save writes", "save the state dict with torch.save(state_dict, PATH)")
    raise _broken(file, f"is not a PyTorch file: it begins with {head[:8]!r}", AGAIN)


def _archive(file: str, descriptor: int, directory: Directory) -> _Archive:
    """The archive, if it is one that torch.save writes in this byte order."""
    pickles = [name for name in directory.members if name.endswith(_PICKLE) and name.count("/") == 1]
    if len(pickles) != 1:
        fact = f"is a zip archive with {len(pickles)} members <name>{_PICKLE}, where torch.save writes one"
        raise _broken(file, fact, "give a file that torch.save wrote")
    archive = _Archive(file, descriptor, directory, pickles[0].removesuffix("data.pkl"))
    outside = [name for name in directory.members if not name.startswith(archive.prefix)]
    if outside:
        fact = f"has members outside {archive.prefix}: {listed(outside)}"
        raise _broken(file, fact, "no checkpoint has such members; do not trust this file")
    if archive.member("constants.pkl") is not None:
        remedy = f'save its state dict: torch.save(torch.jit.load("{file}").state_dict(), PATH)'
        raise _broken(file, "is a TorchScript program, not a checkpoint", remedy)
    packed = [name for name, member in directory.members.items() if not member.stored]
    if packed:
        fact = f"is compressed, so no part of it can be read alone: {listed(packed)}"
        raise _broken(file, fact, "write it anew, " + _SAVE.format(file=file))
    order = archive.member("byteorder")
    if order is not None and (said := archive.read(order)[:16]) != b"little":
        fact = f"has byte order {said.decode(errors='replace')!r}; only little-endian files are read"
        raise _broken(file, fact, "write it anew on a little-endian machine, " + _SAVE.format(file=file))
    return archive


def _pickle(archive: _Archive) -> bytes:
    member = archive.directory.members[archive.prefix + "data.pkl"]
    if member.nbytes > PICKLE_LIMIT:
        fact = f"has a pickle of {member.nbytes} bytes, over {PICKLE_LIMIT}"
        raise _broken(archive.file, fact, "no state dict needs so many; do not trust this file")
    return archive.read(member)


# Which of the values are the state dict


def _state_dict(file: str, value: object, prefix: str) -> tuple[dict[str, PickledTensor], tuple[str, ...]]:
    """The tensors by name, wrappers' marks taken off, and notes; InputError where there is no choosing."""
    if not isinstance(value, dict):
        kind = "one tensor" if isinstance(value, PickledTensor) else "no dict"
        raise _broken(file, f"holds {kind}, not tensors by name", "save a dict: torch.save(model.state_dict(), PATH)")
    found = _nested(value)
    notes = []
    tree: Tree | None
    if prefix:
        tree = _under(value, prefix)
        if tree is None:
            known = f"it has tensors under {_names(found)}" if found else "it has no tensors under any key"
            remedy = f'{known}; source.prefix = "auto" takes those under none' if _direct(value) else known
            raise _broken(file, f"has no tensors under {prefix!r}", remedy)
    elif _direct(value):
        tree = value
    elif len(found) == 1:
        (where, tree), *_ = found.items()
        notes.append(f"{file}: the tensors are those under {where!r}")
    elif found:
        fact = f"has tensors under {_names(found)}, and none beside them"
        raise _broken(file, fact, f'choose one: source.prefix = "{_shown(next(iter(found)))}"')
    else:
        raise _broken(file, "holds no tensors by name", "save a dict: torch.save(model.state_dict(), PATH)")
    rest = [key for key, entry in tree.items() if not isinstance(entry, PickledTensor)]
    if rest:
        count = "1 entry that is no tensor is" if len(rest) == 1 else f"{len(rest)} entries that are no tensors are"
        notes.append(f"{file}: {count} left out: {_names(rest)}")
    return _unwrapped(file, {key: entry for key, entry in tree.items() if isinstance(entry, PickledTensor)}), tuple(notes)


def _direct(tree: Tree) -> bool:
    return any(isinstance(entry, PickledTensor) for entry in tree.values())


def _nested(tree: Tree) -> dict[str, Tree]:
    """The dicts one or two keys down that have tensors by name; the second key is only looked at where the first leads to none."""
    found: dict[str, Tree] = {}
    for key, child in tree.items():
        if isinstance(child, dict):
            if _direct(child):
                found[key] = child
            else:
                below = ((name, entry) for name, entry in child.items() if isinstance(entry, dict))
                found.update({f"{key}.{name}": entry for name, entry in below if _direct(entry)})
    return found


def _under(tree: Tree, prefix: str) -> Tree | None:
    """The dict of tensors that a dotted path leads to; its keys may have dots themselves."""
    for key, child in tree.items():
        if isinstance(child, dict):
            if key == prefix and _direct(child):
                return child
            if prefix.startswith(key + ".") and (found := _under(child, prefix[len(key) + 1 :])) is not None:
                return found
    return None


def _unwrapped(file: str, state: dict[str, PickledTensor]) -> dict[str, PickledTensor]:
    """The tensors under the names that the model has without its wrappers."""
    named = {unwrapped(key): key for key in state}
    if all(key.startswith(_PARALLEL) for key in named):
        named = {key.removeprefix(_PARALLEL): old for key, old in named.items()}
    if len(named) < len(state):
        lost = sorted(set(state) - set(named.values()))
        fact = f"has names that differ only by what wrappers of modules add: {_names(lost)}"
        raise _broken(file, fact, "save the state dict of the bare model")
    return {key: state[old] for key, old in named.items()}


def unwrapped(name: str) -> str:
    """A parameter's name without what wrappers of modules add between its parts.

    >>> unwrapped("_orig_mod.layers.0._checkpoint_wrapped_module.w")
    'layers.0.w'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _names(names: Iterable[str]) -> str:
    return listed([_shown(name) for name in names])


def _shown(name: str) -> str:
    """A name as a message can carry it: no control characters, and not without end."""
    short = name if len(name) <= _NAME else name[: _NAME - 3] + "..."
    return short if short.isprintable() else ascii(short)


# Where the tensors are


def _tensors(archive: _Archive, state: Mapping[str, PickledTensor]) -> dict[str, StoredTensor]:
    """The state dict as byte ranges; InputError with what is not one."""
    keys = dict.fromkeys(tensor.storage.key for tensor in state.values())
    places = {key: _place(archive, key) for key in keys}
    found: dict[str, StoredTensor] = {}
    problems = [place for place in places.values() if isinstance(place, Problem)]
    for name, tensor in state.items():
        place = places[tensor.storage.key]
        if isinstance(place, Problem):
            continue
        stored = _stored(archive.file, name, tensor, *place)
        if isinstance(stored, Problem):
            problems.append(stored)
        else:
            found[name] = stored
    if problems:
        raise InputError(f"{archive.file} cannot be read", few(archive.file, problems))
    return found


def _place(archive: _Archive, key: str) -> tuple[int, int] | Problem:
    """Where a storage begins in the file, and its bytes."""
    member = archive.member(f"data/{key}")
    if member is None:
        return Problem(f"{archive.file}: there is no storage {key[:60]!r} in it, and its pickle needs it", AGAIN)
    try:
        return data_offset(archive.file, archive.descriptor, archive.directory, member), member.nbytes
    except InputError as error:
        return error.problems[0]


def _stored(file: str, name: str, tensor: PickledTensor, begin: int, nbytes: int) -> StoredTensor | Problem:
    """A tensor as a range of the file, in a storage of `nbytes` at byte `begin`; or what is wrong."""
    who = f"{file}: tensor {_shown(name)}"
    if not name.isprintable() or not name:
        return Problem(f"{file}: a tensor's name is {_shown(name) or 'empty'}", "save the state dict under other names")
    code, shape = tensor.dtype.code, tensor.shape
    if not code:
        return Problem(f"{who} is of {tensor.dtype.name}, which is not read", "leave it out, or save it as another dtype")
    if tensor.flags:
        remedy = "save it anew as plain tensors: torch.save({name: tensor.resolve_conj().resolve_neg() ...}, PATH)"
        return Problem(f"{who} is stored with {' and '.join(tensor.flags)} still to be applied", remedy)
    item = max(dtype_of_code(code).bits // 8, 1)
    if math.prod(n for n in shape if n) * item >= SIZE_LIMIT:
        return Problem(f"{who} has shape {list(shape)}, and {code} of this shape overflows 64 bits", AGAIN)
    size = tensor.storage.length * (dtype_of_code(tensor.storage.kind.code).bits // 8 if tensor.storage.kind.code else 1)
    if size != nbytes:
        return Problem(f"{who} is in a storage of {size} bytes by the pickle, and storage {tensor.storage.key[:60]} has {nbytes}", AGAIN)
    last = tensor.offset + sum((n - 1) * step for n, step in zip(shape, tensor.stride, strict=True))
    if 0 not in shape and (last + 1) * item > nbytes:
        return Problem(f"{who} reaches to byte {(last + 1) * item} of a storage of {nbytes}", AGAIN)
    if 0 not in shape and not _row_major(shape, tensor.stride):
        return Problem(f"{who} is a view of shape {list(shape)} with strides {list(tensor.stride)}, not a contiguous range", _PLAIN)
    if code == "F4":
        if not shape:
            return Problem(f"{who} is a scalar of four bits", "leave it out, or save it as another dtype")
        shape = (*shape[:-1], 2 * shape[-1])  # PyTorch counts bytes
    offset = 0 if 0 in shape else tensor.offset * item
    return StoredTensor(name, file, code, shape, begin + offset, math.prod(tensor.shape) * item)


def _row_major(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether elements follow each other as the last index counts fastest; the stride of a dim of one element says nothing."""
    wanted = 1
    for n, step in zip(reversed(shape), reversed(stride), strict=True):
        if n != 1 and step != wanted:
            return False
        wanted *= n
    return True
