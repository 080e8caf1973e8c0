"""Pickles made to do something: none is obeyed, by either reader, and each ends in one clear refusal, soon and in little memory."""

import contextlib
import io
import os
import pickle
import random
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch_zips import Raw, archive, one, write

from shardconv.errors import InputError
from shardconv.formats.pickled import ALLOWED
from shardconv.formats.pytorch import read_torch
from shardconv.formats.unpickling import INSTRUCTIONS, unpickle
from shardconv.verify.torch_files import SHELLS, places

FILE = "m.bin"
AGAIN = "download this file again"
TRUST = "if you trust its author, load it with PyTorch and save the state dict alone, as plain tensors: torch.save(state_dict, PATH)"
CANARY = "canary"
TOUCH = f"open('{CANARY}', 'w').close()"


class Calls:
    """Pickles as a call."""

    def __init__(self, function: object, *args: object, state: object = None) -> None:
        self.call = function, args, state

    def __reduce__(self) -> tuple[object, ...]:
        return self.call


def foreign(name: str) -> str:
    return f"{FILE}: its pickle asks for {name}, which is not among what a state dict needs; nothing of it was run"


def wrong(what: str, at: int) -> str:
    return f"{FILE}: its pickle cannot be used: before byte {at} there is {what}"


def called(name: str, *args: str, protocol: int = 2) -> bytes:
    """A state dict beside which a name is called with words."""
    made = Raw(protocol).add(b"}(").text("w").tensor().text("x").name(name).add(b"(")
    for arg in args:
        made.text(arg)
    return made.add(b"tRu").end()


def stack_called(module: str, name: str, *args: str) -> bytes:
    """The same by the newer instruction, which takes its names from the stack."""
    made = Raw(4).add(b"}").text("x").text(module).text(name).add(b"\x93(")
    for arg in args:
        made.text(arg)
    return made.add(b"tRs").end()


# What each would do, if it were obeyed, is make the canary's file: the test below unpickles some in earnest to show that.
RUN = {
    "os.system": called("os.system", f"touch {CANARY}"),
    "posix.system": called("posix.system", f"touch {CANARY}"),
    "nt.system": called("nt.system", f"touch {CANARY}"),
    "builtins.eval": called("builtins.eval", TOUCH),
    "builtins.exec": called("builtins.exec", TOUCH),
    "__builtin__.eval": called("__builtin__.eval", TOUCH),
    "builtins.open": called("builtins.open", CANARY, "w"),
    "io.open": called("io.open", CANARY, "w"),
    "builtins.getattr": called("builtins.getattr", "", "format"),
    "builtins.__import__": called("builtins.__import__", "this"),
    "builtins.compile": called("builtins.compile", TOUCH, "x", "exec"),
    "builtins.print": called("builtins.print", "x"),
    "subprocess.Popen": called("subprocess.Popen", "true"),
    "subprocess.check_output": called("subprocess.check_output", "true"),
    "socket.create_connection": called("socket.create_connection", "x"),
    "importlib.import_module": called("importlib.import_module", "antigravity"),
    "runpy.run_path": called("runpy.run_path", CANARY),
    "shutil.rmtree": called("shutil.rmtree", CANARY),
    "webbrowser.open": called("webbrowser.open", "x"),
    "pickle.loads": called("pickle.loads", "x"),
    "_pickle.loads": called("_pickle.loads", "x"),
    "torch.load": called("torch.load", "x"),
    "torch.serialization.load": called("torch.serialization.load", "x"),
    "torch.hub.load": called("torch.hub.load", "x"),
    "torch.ops.load_library": called("torch.ops.load_library", "x"),
    "torch.jit.unsupported_tensor_ops.execWrapper": called("torch.jit.unsupported_tensor_ops.execWrapper", TOUCH),
    "torch.storage._load_from_bytes": called("torch.storage._load_from_bytes", "x"),
    "torch._utils._rebuild_device_tensor_from_numpy": called("torch._utils._rebuild_device_tensor_from_numpy", "x"),
    "functools.partial": called("functools.partial", "x"),
    "operator.attrgetter": called("operator.attrgetter", "x"),
    "operator.methodcaller": called("operator.methodcaller", "x"),
    "copyreg._reconstructor": called("copyreg._reconstructor", "x"),
    "types.CodeType": called("types.CodeType", "x"),
    "numpy.testing._private.utils.runstring": called("numpy.testing._private.utils.runstring", TOUCH),
    "timeit.timeit": called("timeit.timeit", TOUCH),
    "pdb.run": called("pdb.run", TOUCH),
    "code.InteractiveInterpreter": called("code.InteractiveInterpreter"),
    "ctypes.CDLL": called("ctypes.CDLL", "x"),
    "collections.Counter": called("collections.Counter", "x"),
    "collections.defaultdict": called("collections.defaultdict"),
    "shardconv.errors.InputError": called("shardconv.errors.InputError", "x"),
    # the same by other instructions
    "os.popen": stack_called("os", "popen", f"touch {CANARY}"),
    "torch._utils.os.system": stack_called("torch._utils", "os.system", f"touch {CANARY}"),
    "torch.Size.__class__.__base__": stack_called("torch", "Size.__class__.__base__"),
    "collections.OrderedDict.fromkeys": stack_called("collections", "OrderedDict.fromkeys", "x"),
    "os.execv": Raw().add(b"(").text("x").add(b"ios\nexecv\n").end(),
    "os.abort": Raw().add(b"(cos\nabort\no").end(),
    "os.getcwd": Raw().add(b"cos\ngetcwd\n)\x81").end(),
    "os.mkdir": Raw(4).add(b"cos\nmkdir\n)}\x92").end(),
    "os._exit": Raw().add(b"cos\n_exit\nK\x03\x85R").end(),
    "posix._exit": pickle.dumps(Calls(os._exit, 3), 2),
    "os.remove": Raw().add(b"cos\nremove\n").end(),
    # a chain of calls, and what a state is given to
    "builtins.setattr": called("builtins.setattr", "x"),
    "__main__.Thing": Raw().add(b"c__main__\nThing\n)\x81}").text("__setstate__").name("os.system").add(b"sb").end(),
    # names that no module has
    "'a\\x1b[31mb.c\\x07'": Raw().add(b"ca\x1b[31mb\nc\x07\n").end(),
    "m" + "m" * 76 + "...": Raw().add(b"c" + b"m" * 200 + b"\nx\n").end(),
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(here: Path) -> tuple[str, str]:
    """The one problem, found twice; nothing has happened, and the check's reader refuses too."""
    before = set(sys.modules)
    with pytest.raises(InputError) as caught:
        read_torch(str(here), FILE, "")
    ((fact, remedy),) = [(problem.fact, problem.remedy) for problem in caught.value.problems]
    assert set(sys.modules) == before
    assert os.listdir(here) == [FILE]
    return fact, remedy


@pytest.mark.parametrize("name", RUN)
def test_a_name_that_is_not_in_the_table_is_refused_and_not_called(name: str, here: Path) -> None:
    write(here / FILE, RUN[name])
    assert refusal(here) == (foreign(name), TRUST)
    with pytest.raises(InputError, match="the source cannot be compared"):
        list(places(str(here / FILE), ""))
    assert os.listdir(here) == [FILE]


@pytest.mark.parametrize("name", ["os.system", "posix.system", "builtins.eval", "builtins.exec", "__builtin__.eval"])
def test_such_pickles_do_harm_where_they_are_obeyed(name: str, here: Path) -> None:
    class Obedient(pickle.Unpickler):
        def persistent_load(self, _: object) -> object:
            return None

        def find_class(self, module: str, wanted: str) -> object:
            return (lambda *_: {}) if module == "torch._utils" else super().find_class(module, wanted) if module != "torch" else None

    Obedient(io.BytesIO(RUN[name])).load()
    assert os.listdir(here) == [CANARY]


SELF = Raw().add(b"]q\0h\0a").end()
# what: (pickle, fact, remedy)
BROKEN: dict[str, tuple[bytes, str, str]] = {
    "extension registry": (
        Raw().add(b"\x82\x01").end(),
        wrong("instruction b'\\x82', which no state dict needs", 3),
        TRUST,
    ),
    "object of a class that is allowed": (
        Raw().add(b"(").name("collections.OrderedDict").add(b"o").end(),
        wrong("instruction b'o', which no state dict needs", 29),
        TRUST,
    ),
    "new object of a class that is allowed": (
        Raw().name("torch.Size").add(b")\x81").end(),
        wrong("instruction b'\\x81', which no state dict needs", 16),
        TRUST,
    ),
    "text protocol": (b"I1\n.", wrong("instruction b'I', which no state dict needs", 1), TRUST),
    "persistent id as text": (Raw().add(b"Pstorage\n").end(), wrong("instruction b'P', which no state dict needs", 3), TRUST),
    "duplicate": (Raw().add(b"]2").end(), wrong("instruction b'2', which no state dict needs", 4), TRUST),
    "out-of-band buffer": (Raw(5).add(b"\x97").end(), wrong("instruction b'\\x97', which no state dict needs", 3), TRUST),
    "a set": (Raw(4).add(b"\x8f").end(), wrong("instruction b'\\x8f', which no state dict needs", 3), TRUST),
    "protocol 0": (b"\x80\0.", wrong("protocol 0; PyTorch writes 2 to 5", 2), AGAIN),
    "protocol 255": (b"\x80\xff.", wrong("protocol 255; PyTorch writes 2 to 5", 2), AGAIN),
    "a call of a storage": (
        Raw().name("torch.FloatStorage").add(b")R").end(),
        wrong("a call of what is not called", 24),
        AGAIN,
    ),
    "a call of a tensor": (Raw().tensor().add(b")R").end(), "a call of what is not called", AGAIN),
    "a call of a word": (Raw().text("os.system").add(b")R").end(), wrong("a call of what is not called", 18), AGAIN),
    "a call without a tuple": (Raw().name("torch.Size").add(b"]R").end(), wrong("a call of what is not called", 16), AGAIN),
    "an OrderedDict of something": (
        Raw().name("collections.OrderedDict").add(b"]\x85R").end(),
        wrong("an OrderedDict that is made of something", 30),
        AGAIN,
    ),
    "a state for a tensor": (Raw().tensor().add(b"}").text("data").text("x").add(b"sb").end(), "attributes of what has none", AGAIN),
    "a state for a class": (Raw().name("collections.OrderedDict").add(b"}b").end(), wrong("attributes of what has none", 29), AGAIN),
    "entries for a tensor": (Raw().tensor().text("a").add(b"Ns").end(), "entries of what is no dict", AGAIN),
    "items for a dict": (Raw().add(b"}Na").end(), wrong("items of what is no list", 5), AGAIN),
    "half an entry": (Raw().add(b"}(").text("a").add(b"u").end(), wrong("entries of what is no dict", 11), AGAIN),
    "a key twice": (Raw().add(b"}(").text("a").add(b"N").text("a").add(b"Nu").end(), wrong("the key 'a' twice", 19), AGAIN),
    "a storage that is none": (Raw().add(b"(K\x01tQ").end(), wrong("a persistent id that is no storage", 7), AGAIN),
    "a storage of another kind": (
        Raw().add(b"(").text("module").name("torch.FloatStorage").text("0").text("cpu").add(b"K\x02tQ").end(),
        "a persistent id that is no storage",
        AGAIN,
    ),
    "a storage of a dtype": (Raw().storage("torch.float32", "0", 2).end(), "a storage that is no class, key and number of elements", AGAIN),
    "a storage of a negative length": (
        Raw().storage("torch.FloatStorage", "0", -1).end(),
        "a storage that is no class, key and number of elements",
        AGAIN,
    ),
    "a tensor without a storage": (
        Raw().name("torch._utils._rebuild_tensor_v2").add(b"(NNNNNNtR").end(),
        "a tensor whose storage has no dtype",
        AGAIN,
    ),
    "a tensor without arguments": (
        Raw().name("torch._utils._rebuild_tensor_v2").add(b")R").end(),
        f"{FILE}: its pickle cannot be used: before byte 37 it runs out of values or of bytes",
        AGAIN,
    ),
    "a parameter of a word": (
        Raw().name("torch._utils._rebuild_parameter").text("x").add(b"\x88N\x87R").end(),
        "a parameter that is no tensor",
        AGAIN,
    ),
    "a negative size": (one(shape=(-1,)), "a tensor with a negative size, or with more sizes than strides", AGAIN),
    "a negative stride": (one(stride=(-1,)), "a tensor with a negative size, or with more sizes than strides", AGAIN),
    "a negative offset": (one(offset=-1), "a tensor with a negative size, or with more sizes than strides", AGAIN),
    "more sizes than strides": (one(shape=(1, 2)), "a tensor with a negative size, or with more sizes than strides", AGAIN),
    "65 dims": (one(shape=(1,) * 65, stride=(1,) * 65), "a size or stride that is no tuple of integers", AGAIN),
    "a value that was not kept": (Raw().add(b"h\7").end(), wrong("value 7, which was not kept", 4), AGAIN),
    "a value kept far away": (
        Raw().add(b"Nr\xff\xff\xff\xff").end(),
        wrong("a value kept as number 4294967295, after 0", 8),
        AGAIN,
    ),
    "a huge integer": (
        Raw().add(b"\x8a\xff" + b"\xff" * 255).end(),
        wrong("an integer of 255 bytes", 4),
        AGAIN,
    ),
    "a huge integer by four bytes of length": (
        Raw().add(b"\x8b\xff\xff\xff\x7f").end(),
        wrong("instruction b'\\x8b', which no state dict needs", 3),
        TRUST,
    ),
    "text of 4 GiB": (
        Raw().add(b"X\xff\xff\xff\xff").end(),
        wrong("an instruction that needs 4294967295 bytes where 1 are left", 7),
        AGAIN,
    ),
    "text of 2^64 bytes": (
        Raw(4).add(b"\x8d" + b"\xff" * 8).end(),
        wrong(f"an instruction that needs {2**64 - 1} bytes where 1 are left", 11),
        AGAIN,
    ),
    "bytes of 2^64 bytes": (
        Raw(4).add(b"\x8e" + b"\xff" * 8).end(),
        wrong(f"an instruction that needs {2**64 - 1} bytes where 1 are left", 11),
        AGAIN,
    ),
    "a frame of 2^63 bytes": (
        Raw(4).add(b"\x95" + struct.pack("<Q", 2**63)).end(),
        wrong(f"a frame of {2**63} bytes", 11),
        AGAIN,
    ),
    "text that is not UTF-8": (
        Raw().add(b"X\1\0\0\0\xff").end(),
        wrong("text that is not UTF-8", 8),
        AGAIN,
    ),
    "half a surrogate pair": (Raw().add(b"X\3\0\0\0\xed\xa0\x80").end(), wrong("text that is not UTF-8", 10), AGAIN),
    "a name without an end": (Raw().add(b"ctorch").end(), wrong("a line that does not end", 3), AGAIN),
    "a key that takes forever to hash": (
        Raw().add(b"}()q\0" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60)) + b"tNs").end(),
        "an entry whose key is neither text nor a number",
        TRUST,
    ),
    "no end": (Raw().add(b"}").made, f"{FILE}: its pickle cannot be used: before byte 3 it runs out of values or of bytes", AGAIN),
    "nothing": (b"", f"{FILE}: its pickle cannot be used: before byte 0 it runs out of values or of bytes", AGAIN),
    "an end and nothing": (b".", f"{FILE}: its pickle cannot be used: before byte 1 it runs out of values or of bytes", AGAIN),
    "more after the end": (Raw().add(b"}").end() + b"cos\nsystem\n", wrong("more after its end", 4), AGAIN),
    "marks without an end": (
        Raw().add(b"(" * 1000 + b"t" * 1001).end(),
        f"{FILE}: its pickle cannot be used: before byte 2003 it runs out of values or of bytes",
        AGAIN,
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_no_state_dict_has_is_refused(case: str, here: Path) -> None:
    data, fact, remedy = BROKEN[case]
    write(here / FILE, data)
    started = time.perf_counter()
    said, advice = refusal(here)
    assert time.perf_counter() - started < 5
    assert (said == fact if fact.startswith(FILE) else said.endswith(f"there is {fact}")) and advice == remedy


# Bombs, each in a process that may take no more than so much memory

LIMITED = """
import resource, sys, time
from shardconv.errors import InputError
from shardconv.formats.pytorch import read_torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    print(sorted(read_torch(".", "m.bin", "").tensors))
except InputError as error:
    print(error.problems[0].fact)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "10^7 instructions": (lambda: b"\x80\x02" + b"N" * 10**7 + b".", f"{FILE}: its pickle has over {INSTRUCTIONS:,} instructions"),
    "10^7 empty dicts": (lambda: b"\x80\x02" + b"}" * 10**7 + b".", f"{FILE}: its pickle has over {INSTRUCTIONS:,} instructions"),
    "10^7 marks": (lambda: b"\x80\x02" + b"(" * 10**7 + b".", f"{FILE}: its pickle has over {INSTRUCTIONS:,} instructions"),
    "10^7 values kept": (
        lambda: b"\x80\x04" + b"]\x94" * 10**7 + b".",
        f"{FILE}: its pickle has over {INSTRUCTIONS:,} instructions",
    ),
    "10^7 instructions in lists": (
        lambda: b"\x80\x02](" + b"]" * 10**7 + b"e.",
        f"{FILE}: its pickle has over {INSTRUCTIONS:,} instructions",
    ),
    "a list in a list, 10^6 deep": (
        lambda: b"\x80\x02" + b"]" * 10**6 + b"a" * (10**6 - 1) + b".",
        f"{FILE} holds no dict, not tensors by name",
    ),
    "a tuple in a tuple, 10^6 deep": (lambda: b"\x80\x02)" + b"\x85" * 10**6 + b".", f"{FILE} holds no dict, not tensors by name"),
    "a dict in a dict, 10^5 deep": (
        lambda: b"\x80\x02" + b"}X\1\0\0\0a" * 10**5 + b"}" + b"s" * 10**5 + b".",
        f"{FILE} holds no tensors by name",
    ),
    "a list that has itself": (lambda: SELF, f"{FILE} holds no dict, not tensors by name"),
    "a dict that has itself": (lambda: Raw().add(b"}q\0").text("a").add(b"h\0s").end(), f"{FILE} holds no tensors by name"),
    "a billion laughs": (
        lambda: b"\x80\x02}X\1\0\0\0a]q\0" + b"".join(b"](" + b"h%c" % i * 10 + b"eq%c" % (i + 1) for i in range(90)) + b"\x86s.",
        f"{FILE}: its pickle cannot be used: before byte 2264 there is entries of what is no dict",
    ),
}


@pytest.mark.parametrize("case", BOMBS)
def test_bombs_end_soon_and_in_little_memory(case: str, here: Path) -> None:
    make, said = BOMBS[case]
    write(here / FILE, make())
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    fact, mebibytes = done.stdout.splitlines()
    assert fact == said
    assert int(mebibytes) < 512
    assert time.perf_counter() - started < 60


def test_a_tree_of_lists_beside_a_tensor_is_never_walked(here: Path) -> None:
    made = Raw().add(b"}q\0(").text("w").tensor().text("x").add(b"]q\1")
    for i in range(1, 100):
        made.add(b"](" + b"h%c" % i * 10 + b"eq%c" % (i + 1))
    data = made.made
    # the hundred lists are on the stack: gathered in a tuple, so that they are one value
    write(here / FILE, data[: data.index(b"]q\1")] + b"(" + data[data.index(b"]q\1") :] + b"tu.")
    found = read_torch(str(here), FILE, "")
    assert (list(found.tensors), found.notes) == (["w"], ("m.bin: 1 entry that is no tensor is left out: x",))


def test_a_pickle_that_is_too_long_is_not_read(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shardconv.formats import pytorch

    monkeypatch.setattr(pytorch, "PICKLE_LIMIT", 100)
    write(here / FILE, one())
    assert refusal(here) == (f"{FILE} has a pickle of {len(one())} bytes, over 100", "no state dict needs so many; do not trust this file")


@pytest.mark.parametrize("case", sorted(BROKEN.keys() - {"a key that takes forever to hash"}))
def test_the_check_stumbles_over_none_of_them(case: str, here: Path) -> None:
    """The converter refuses these files before a check is ever made, but the check does not rely on that to be safe."""
    write(here / FILE, BROKEN[case][0])
    with contextlib.suppress(InputError):
        list(places(str(here / FILE), ""))
    assert os.listdir(here) == [FILE]


# The tables


def test_what_may_be_named_is_what_a_state_dict_needs() -> None:
    calls = {name for name, named in ALLOWED.items() if named.make is not None}
    assert calls == {
        "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3", "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state", "collections.OrderedDict", "torch.Size", "torch.device", "_codecs.encode",
        "__builtin__.set", "builtins.set", "__builtin__.frozenset", "builtins.frozenset",
    }  # fmt: skip
    assert calls == set(SHELLS)
    assert all(name.startswith("torch.") for name in ALLOWED.keys() - calls)


@pytest.mark.parametrize("name", SHELLS)
def test_no_pickle_can_change_a_shell(name: str, here: Path) -> None:
    module, _, word = name.rpartition(".")
    state = Raw().add(f"c{module}\n{word}\n".encode()).add(b"N}").text("__call__").add(b"Ns\x86b0").add(b"}").text("w").tensor().add(b"s")
    write(here / FILE, state.end())
    with pytest.raises(InputError, match=r"the source cannot be compared"):
        list(places(str(here / FILE), ""))
    write(here / FILE, one())
    assert list(places(str(here / FILE), "")) == [("w", ("F32", (2,), places_at(here)))]


def places_at(here: Path) -> int:
    return (here / FILE).read_bytes().index(bytes(8), 30)


@pytest.mark.parametrize("seed", range(4))
def test_random_damage_ends_in_a_refusal_or_in_values(seed: int) -> None:
    rng = random.Random(seed)
    sound = Raw().add(b"}(").text("a").tensor().text("b").tensor(shape=(1, 2), stride=(2, 1)).text("n").add(b"K\x03u").end()
    for _ in range(1500):
        data = bytearray(sound)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            data[at : at + rng.randint(0, 2)] = bytes(rng.randrange(256) for _ in range(rng.randint(0, 2)))
        with contextlib.suppress(InputError):
            unpickle(FILE, bytes(data))


def test_an_archive_without_a_pickle_is_no_checkpoint(here: Path) -> None:
    (here / FILE).write_bytes(archive(b"", top="x/y/"))
    assert refusal(here)[0] == f"{FILE} is a zip archive with 0 members <name>/data.pkl, where torch.save writes one"
