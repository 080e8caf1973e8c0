"""What a PyTorch file's pickle says, without running any of it.

A pickle is a program for a small machine with a stack, and two of its instructions import and call what the file names. Here they do not:
a name is looked up in the table of `pickled`, which has what `torch.save` writes for state dicts, each with a function that makes plain
values, and a name that is not in it ends the reading. Nothing is imported, no attribute is set, and no method of a value is called.

The machine is bounded. Every instruction takes constant memory or memory of the pickle's own length, their number is limited, nothing is
hashed but text, and nothing is copied or walked through twice: a pickle that builds a tree of a billion leaves out of lists of lists costs
what its instructions cost.

Instructions of protocols 2 to 5 are known, as far as `pickle` writes them for such values.
"""

import struct
from collections.abc import Callable, Mapping

from shardconv.errors import InputError, Problem
from shardconv.formats.pickled import ALLOWED, OPAQUE, UNTRUSTED, Named, Storage, Wrong
from shardconv.formats.strict_json import AGAIN

# A tensor takes about 40 instructions, so this is over 100k tensors in one file; it takes some seconds.
INSTRUCTIONS = 5_000_000
# Bytes of an integer: numbers of elements have 8, seeds of random generators 16.
_INTEGER = 16
# Keys of dicts beside text; they are left out.
_PLAIN_KEYS = frozenset((int, float, bool, type(None)))


def unpickle(file: str, raw: bytes) -> object:
    """The value that a pickle describes: dicts, lists, tuples, text, numbers, None, and the types of `pickled`; pure.

    Keys of dicts that are no text are left out with their values. Raises InputError where the pickle is damaged, names what is not in
    the table, or is too long.
    """
    machine = _Machine(raw)
    try:
        return machine.run()
    except Wrong as wrong:
        fact, remedy = f"{file}: its pickle cannot be used: before byte {machine.at} there is {wrong}", wrong.remedy
    except IndexError:
        fact, remedy = f"{file}: its pickle cannot be used: before byte {machine.at} it runs out of values or of bytes", AGAIN
    except UnicodeDecodeError:
        fact, remedy = f"{file}: its pickle cannot be used: before byte {machine.at} there is text that is not UTF-8", AGAIN
    except _Foreign as foreign:
        fact = f"{file}: its pickle asks for {foreign.name}, which is not among what a state dict needs; nothing of it was run"
        remedy = foreign.remedy
    except _TooLong:
        fact = f"{file}: its pickle has over {INSTRUCTIONS:,} instructions"
        remedy = "no state dict needs so many; do not trust this file"
    raise InputError(f"{file} cannot be read", [Problem(fact, remedy)])


class _TooLong(Exception):
    pass


class _Foreign(Exception):
    """A name that is not in the table."""

    def __init__(self, name: str) -> None:
        self.name = name if len(name) <= 80 else name[:77] + "..."
        if not self.name.isprintable():
            self.name = ascii(self.name)
        self.remedy = next((remedy for end, remedy in _REMEDIES.items() if name.endswith(end)), UNTRUSTED)
        super().__init__(name)


_PLAIN = "save plain tensors: torch.save({name: tensor.%s for name, tensor in state_dict.items()}, PATH)"
_REMEDIES = {
    "_rebuild_sparse_tensor": "sparse tensors are not read; " + _PLAIN % "to_dense()",
    "_rebuild_sparse_csr_tensor": "sparse tensors are not read; " + _PLAIN % "to_dense()",
    "_rebuild_nested_tensor": "nested tensors are not read; save plain tensors",
    "_rebuild_qtensor": "quantised tensors are not read; " + _PLAIN % "dequantize()",
    "_rebuild_from_type_v2": "subclasses of tensors are not read; " + _PLAIN % "as_subclass(torch.Tensor)",
    "_rebuild_wrapper_subclass": "subclasses of tensors are not read; " + _PLAIN % "full_tensor()",
    "_rebuild_meta_tensor_no_storage": "tensors on the meta device have no data; save the model after its weights are loaded",
}


class _Machine:
    """The stack machine: `marks` are the stacks that were put aside for the present one."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.at = 0
        self.stack: list[object] = []
        self.marks: list[list[object]] = []
        self.memo: dict[int, object] = {}

    def run(self) -> object:
        raw, known = self.raw, _INSTRUCTIONS
        for _ in range(INSTRUCTIONS):
            code = raw[self.at]
            self.at += 1
            if code == _STOP:
                if self.at != len(raw):
                    raise Wrong("more after its end")
                return self.stack[-1]
            do = known.get(code)
            if do is None:
                raise Wrong(f"instruction {bytes([code])!r}, which no state dict needs", UNTRUSTED)
            do(self)
        raise _TooLong

    def take(self, count: int) -> bytes:
        """The next bytes of the pickle."""
        at = self.at
        if count > len(self.raw) - at:
            raise Wrong(f"an instruction that needs {count} bytes where {len(self.raw) - at} are left")
        self.at = at + count
        return self.raw[at : at + count]

    def byte(self) -> int:
        self.at += 1
        return self.raw[self.at - 1]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def line(self) -> str:
        end = self.raw.find(b"\n", self.at)
        if end < 0:
            raise Wrong("a line that does not end")
        found = self.raw[self.at : end].decode()
        self.at = end + 1
        return found

    def items(self) -> list[object]:
        """The values since the last mark."""
        found, self.stack = self.stack, self.marks.pop()
        return found


def _name(machine: _Machine, name: str) -> None:
    found = ALLOWED.get(name)
    if found is None:
        raise _Foreign(name)
    machine.stack.append(found)


def _instance(machine: _Machine) -> None:
    raise _Foreign(f"{machine.line()}.{machine.line()}")


def _stack_name(machine: _Machine) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    if type(name) is not str or type(module) is not str:
        raise Wrong("a name that is no text")
    _name(machine, f"{module}.{name}")


def _call(machine: _Machine) -> None:
    args, named = machine.stack.pop(), machine.stack.pop()
    if type(named) is not Named or named.make is None or type(args) is not tuple:
        raise Wrong("a call of what is not called")
    machine.stack.append(named.make(args))


def _persistent(machine: _Machine) -> None:
    found = machine.stack.pop()
    if type(found) is not tuple or len(found) != 5 or found[0] != "storage":
        raise Wrong("a persistent id that is no storage")
    _, kind, key, _, length = found
    if type(kind) is not Named or not kind.name.endswith("Storage") or type(key) is not str or type(length) is not int or length < 0:
        raise Wrong("a storage that is no class, key and number of elements")
    machine.stack.append(Storage(kind, key, length))


def _build(machine: _Machine) -> None:
    machine.stack.pop()
    if type(machine.stack[-1]) is not dict:  # an OrderedDict's attributes, such as `_metadata`, are nobody's weights
        raise Wrong("attributes of what has none")


def _set(machine: _Machine, items: list[object]) -> None:
    target = machine.stack[-1]
    if type(target) is not dict or len(items) % 2:
        raise Wrong("entries of what is no dict")
    for i in range(0, len(items), 2):
        key = items[i]
        if type(key) is str:
            if key in target:
                raise Wrong(f"the key {key[:60]!r} twice")
            target[key] = items[i + 1]
        elif type(key) not in _PLAIN_KEYS:  # a tuple of tuples of tuples may take forever to hash, in whatever reads this file next
            raise Wrong("an entry whose key is neither text nor a number", UNTRUSTED)


def _append(machine: _Machine, items: list[object]) -> None:
    target = machine.stack[-1]
    if type(target) is not list:
        raise Wrong("items of what is no list")
    target += items


def _whole_dict(machine: _Machine) -> None:
    items = machine.items()
    machine.stack.append({})
    _set(machine, items)


def _tuple(count: int) -> Callable[[_Machine], None]:
    def do(machine: _Machine) -> None:
        stack = machine.stack
        if len(stack) < count:
            raise IndexError
        found = tuple(stack[-count:])
        del stack[-count:]
        stack.append(found)

    return do


def _marked_tuple(machine: _Machine) -> None:
    items = machine.items()
    machine.stack.append(tuple(items))


def _marked_list(machine: _Machine) -> None:
    items = machine.items()
    machine.stack.append(items)


def _mark(machine: _Machine) -> None:
    machine.marks.append(machine.stack)
    machine.stack = []


def _pair(machine: _Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    _set(machine, [key, value])


def _get(machine: _Machine, index: int) -> None:
    try:
        machine.stack.append(machine.memo[index])
    except KeyError:
        raise Wrong(f"value {index}, which was not kept") from None


def _put(machine: _Machine, index: int) -> None:
    if index > len(machine.memo):
        raise Wrong(f"a value kept as number {index}, after {len(machine.memo)}")
    machine.memo[index] = machine.stack[-1]


def _text(machine: _Machine, size: int) -> None:
    machine.stack.append(machine.take(machine.number(size)).decode())


def _bytes(machine: _Machine, size: int) -> None:
    machine.take(machine.number(size))
    machine.stack.append(OPAQUE)


def _integer(machine: _Machine) -> None:
    size = machine.number(1)
    if size > _INTEGER:
        raise Wrong(f"an integer of {size} bytes")
    machine.stack.append(int.from_bytes(machine.take(size), "little", signed=True))


def _protocol(machine: _Machine) -> None:
    protocol = machine.number(1)
    if not 2 <= protocol <= 5:
        raise Wrong(f"protocol {protocol}; PyTorch writes 2 to 5")


def _frame(machine: _Machine) -> None:
    if (size := machine.number(8)) > len(machine.raw) - machine.at:
        raise Wrong(f"a frame of {size} bytes")


def _push(value: object) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(value)


_STOP = ord(".")
_INSTRUCTIONS: Mapping[int, Callable[[_Machine], None]] = {
    ord(code): do
    for code, do in {
        "\x80": _protocol,
        "\x95": _frame,
        "(": _mark,
        "N": _push(None),
        "\x88": _push(True),
        "\x89": _push(False),
        "J": lambda m: m.stack.append(int.from_bytes(m.take(4), "little", signed=True)),
        "K": lambda m: m.stack.append(m.byte()),
        "M": lambda m: m.stack.append(m.number(2)),
        "\x8a": _integer,
        "G": lambda m: m.stack.append(struct.unpack(">d", m.take(8))[0]),
        "X": lambda m: _text(m, 4),
        "\x8c": lambda m: _text(m, 1),
        "\x8d": lambda m: _text(m, 8),
        "U": lambda m: _bytes(m, 1),
        "T": lambda m: _bytes(m, 4),
        "C": lambda m: _bytes(m, 1),
        "B": lambda m: _bytes(m, 4),
        "\x8e": lambda m: _bytes(m, 8),
        "]": lambda m: m.stack.append([]),
        "a": lambda m: _append(m, [m.stack.pop()]),
        "e": lambda m: _append(m, m.items()),
        "l": _marked_list,
        "}": lambda m: m.stack.append({}),
        "s": _pair,
        "u": lambda m: _set(m, m.items()),
        "d": _whole_dict,
        ")": _push(()),
        "\x85": _tuple(1),
        "\x86": _tuple(2),
        "\x87": _tuple(3),
        "t": _marked_tuple,
        "q": lambda m: _put(m, m.byte()),
        "r": lambda m: _put(m, m.number(4)),
        "\x94": lambda m: _put(m, len(m.memo)),
        "h": lambda m: _get(m, m.byte()),
        "j": lambda m: _get(m, m.number(4)),
        "c": lambda m: _name(m, f"{m.line()}.{m.line()}"),
        "i": _instance,
        "\x93": _stack_name,
        "Q": _persistent,
        "R": _call,
        "b": _build,
    }.items()
}
