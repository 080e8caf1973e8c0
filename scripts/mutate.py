"""The mutation check: seeds faults into the algebra, one at a time, and shows that the tests kill every one.

    python scripts/mutate.py [WORD]       (only the faults that have WORD in their name or module)

Each fault is a text in a module and what replaces it, in a copy of the package. The module's tests run on the copy, the same examples each
time; the fault is killed when one fails, or when it crashes the interpreter. Exits 1 where a fault survives, or its text is no longer in
the module: a fault that cannot be seeded says nothing.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = {
    "axes": ("test_axes.py", "test_route.py"),
    "route": ("test_route.py",),
    "copying": ("test_copying.py", "test_route.py"),
    "boxes": ("test_boxes.py", "test_route.py"),
}
# Far above what the slowest takes, for a fault that makes a loop endless.
PATIENCE = 180.0


@dataclass(frozen=True)
class Fault:
    """What is wrong, in which module: `text` becomes `fault`."""

    name: str
    module: str
    text: str
    fault: str


FAULTS = (
    # keys
    Fault("a hole's offset is not added", "axes", "else str(value + self.start)", "else str(value)"),
    Fault("a hole's offset is not taken off", "axes", "int(text) - self.start", "int(text)"),
    Fault("labels are spelled as numbers", "axes", "self.labels[value] if self.labels else str", "str"),
    Fault("labels are regular expressions", "axes", '"|".join(map(re.escape, hole.labels))', '"|".join(hole.labels)'),
    Fault("a name is a regular expression", "axes", "pieces = [re.escape(text) for text", "pieces = [text for text"),
    Fault("leading zeros are read", "axes", " if str(int(text)) == text else -1", ""),
    Fault("numbers of any length are read", "axes", "[0-9]{1,18}", "[0-9]+"),
    Fault("a key may go on after its end", "axes", ".fullmatch(key)", ".match(key)"),
    Fault("holes that touch are allowed", "axes", 'not text.strip("0123456789")', "False"),
    Fault(
        "only the first digit of a hole is named",
        "axes",
        "for hole in self.holes for digit in hole.dim}",
        "for hole in self.holes for digit in hole.dim[:1]}",
    ),
    # positions
    Fault("the offset of a digit is dropped", "axes", "value * digit.radix + digit.offset + index", "value * digit.radix + index"),
    Fault("size instead of radix", "axes", "value = value * digit.radix + digit.offset", "value = value * digit.size + digit.offset"),
    Fault("digits in the wrong order", "axes", "value = 0\n    for digit in dim:", "value = 0\n    for digit in reversed(dim):"),
    Fault("positions outside wrap around", "axes", "if not 0 <= value < math.prod(digit.radix for digit in dim):", "if value < 0:"),
    Fault("room decodes to an index", "axes", "if not 0 <= place - digit.offset < digit.size", "if not 0 <= place < digit.radix"),
    Fault(
        "a shape without room",
        "axes",
        "tuple(math.prod(digit.radix for digit in dim) for dim in self.dims)",
        "tuple(math.prod(digit.size for digit in dim) for dim in self.dims)",
    ),
    # the notation
    Fault("the part of a sum is ignored", "axes", "for token in terms[part] for digit", "for token in terms[0] for digit"),
    Fault("a part starts one too late", "axes", "sum(lengths[:part])", "sum(lengths[: part + 1])"),
    Fault(
        "a sum ends with its part",
        "axes",
        "math.prod(digit.radix for digit in rest), sum(lengths),",
        "math.prod(digit.radix for digit in rest), sum(lengths[: part + 1]),",
    ),
    Fault("a sum keeps one digit of its part", "axes", "before // step), *rest)", "before // step), *rest[1:])"),
    Fault("a part starts in elements, not steps", "axes", "before // step), *rest", "before), *rest"),
    Fault("a split in the wrong order", "axes", "for name in size.split()", "for name in reversed(size.split())"),
    Fault("an axis may stand twice", "axes", "used.count(axis) > 1", "used.count(axis) > 2"),
    # pieces
    Fault("the buffer's origin is forgotten", "route", "return start - origin, start - origin + ", "return start, start + "),
    Fault("room is taken for data", "route", "min(stop - digit.offset, digit.size)", "stop - digit.offset"),
    Fault("the room before is taken for data", "route", "max(start - digit.offset, 0)", "start - digit.offset"),
    Fault(
        "the target's offset is forgotten",
        "route",
        "(ranges[digit.axis][0] + digit.offset - start, ranges[digit.axis][1] + digit.offset - start)",
        "(ranges[digit.axis][0] - start, ranges[digit.axis][1] - start)",
    ),
    Fault("axes in the name are not walked", "route", "axes = list(source.named)", "axes: list[str] = []"),
    Fault(
        "axes outside a partly read digit are not walked", "route", "if not contiguous and length > 1:", "if not contiguous and length > 2:"
    ),
    Fault("contiguous by size, not by radix", "route", "contiguous and length == digit.radix", "contiguous and length == digit.size"),
    Fault("digits are not transposed", "route", "order=(*order, *(place", "order=(*sorted(order), *(place"),
    Fault("a plain piece may be transposed", "route", "return moved == sorted(moved)", "return True"),
    Fault(
        "a plain piece may be part of a buffer",
        "route",
        "if any(side != (0, n) for side, n in zip(self.region, shape, strict=True)):",
        "if False:",
    ),
    Fault(
        "a plain piece may leave room",
        "route",
        "if any(side != (0, n) for side, n in zip(self.within, self.split, strict=True)):",
        "if False:",
    ),
    # boxes of digits
    Fault(
        "the first part of a range stands twice",
        "route",
        "            yield ((first, first + 1), *rest)\n        first += 1",
        "            yield ((first, first + 1), *rest)",
    ),
    Fault(
        "the first part of a range starts at zero", "route", "digit_boxes(dim[1:], start % inner, inner)", "digit_boxes(dim[1:], 0, inner)"
    ),
    Fault("the last part of a range is lost", "route", "    if stop % inner:\n", "    if stop % inner > 1:\n"),
    Fault("a range in one place is cut in three", "route", "if first == last and stop - start < inner:", "if False:"),
    Fault("an empty range has a box", "route", "    if start >= stop:\n        return\n", ""),
    # the copy
    Fault("the last tile is forgotten", "copying", "range(0, out.shape[place], steps", "range(0, max(out.shape[place] - 1, 1), steps"),
    Fault(
        "axes are merged by one side only",
        "copying",
        "if shape and strides[-1] == (a * n, b * n):",
        "if shape and strides[-1][0] == a * n:",
    ),
    Fault("a merged axis keeps its outer stride", "copying", "            strides[-1] = (a, b)\n", ""),
    Fault("an axis is in rows and in columns", "copying", "if axis in taken or length < 2:", "if length < 2:"),
    Fault("nothing is tiled", "copying", "if out.size < SMALL:", "if out.size >= 0:"),
    Fault("columns are as long as rows", "copying", "WIDTH // out.itemsize", "WIDTH"),
    Fault("tiles do not fit the scratch", "copying", "        length //= run[axis]\n", ""),
    Fault("the fastest axis by the sign of its stride", "copying", "abs(array.strides[axis])", "array.strides[axis]"),
    Fault(
        "a short axis is looped over once",
        "copying",
        "                copy(*part)\n            return",
        "                copy(*part)\n                return",
    ),
    Fault(
        "the scratch lies the other way",
        "copying",
        "math.prod(block.shape[:rows]), math.prod(block.shape[rows:])",
        "math.prod(block.shape[rows:]), math.prod(block.shape[:rows])",
    ),
    # chunks
    Fault("the last chunk is not clipped", "boxes", "min((i + 1) * c, n)", "(i + 1) * c"),
    Fault("the last chunk is forgotten", "boxes", "-(-n // c) if c", "n // c if c"),
    Fault("chunks are counted by columns", "boxes", "for count in reversed(grid):", "for count in grid:"),
    Fault("chunks outside the grid wrap around", "boxes", "if not 0 <= number < math.prod(grid):", "if not math.prod(grid):"),
    Fault(
        "a scalar is sliced to a number",
        "boxes",
        "return (..., *(slice(start, stop) for start, stop in box))",
        "return tuple(slice(start, stop) for start, stop in box)",
    ),
)


WIDTH = max(len(fault.name) for fault in FAULTS)


@dataclass(frozen=True)
class Verdict:
    """How the tests went on a copy with a fault: what killed it, or what happened instead."""

    killed: bool
    how: str
    seconds: float


def judge(fault: Fault) -> Verdict:
    """Seeds a fault into a copy and runs its module's tests there."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place)
        shutil.copytree(ROOT / "shardconv", copy / "shardconv", ignore=shutil.ignore_patterns("__pycache__"))
        (copy / "tests").mkdir()
        for name in ("algebra_oracle.py", *TESTS[fault.module]):
            shutil.copy(ROOT / "tests" / name, copy / "tests")
        module = copy / "shardconv" / f"{fault.module}.py"
        text = module.read_text()
        if text.count(fault.text) != 1:
            return Verdict(False, f"NOT SEEDED: its text is {text.count(fault.text)} times in {fault.module}.py", 0.0)
        module.write_text(text.replace(fault.text, fault.fault))
        killed, how = _run(copy, [f"tests/{name}" for name in TESTS[fault.module]])
    return Verdict(killed, how, time.perf_counter() - started)


def _run(copy: Path, tests: list[str]) -> tuple[bool, str]:
    """Whether a test fails on a copy, and which one, or what happened instead."""
    options = ["-x", "-q", "-c", os.devnull, "--rootdir", str(copy), "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "SHARDCONV_LAWS": "mutants"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False, f"NO END after {PATIENCE:.0f} s"
    if done.returncode == 0:
        return False, "SURVIVED"
    if done.returncode < 0:
        return True, f"killed by signal {-done.returncode}"
    failed = re.search(r"^FAILED \S+::(test_\w+)", done.stdout, re.MULTILINE)
    if done.returncode == 1 and failed:
        return True, f"killed by {failed[1]}"
    return False, f"NO VERDICT: pytest ended with {done.returncode}\n{done.stdout}{done.stderr}"


def main() -> int:
    """Judges every fault, after showing that without one the tests pass."""
    word = " ".join(sys.argv[1:])
    faults = [fault for fault in FAULTS if word in fault.name or word == fault.module]
    if not faults:
        sys.stderr.write(f"no fault has {word!r} in its name\n")
        return 2
    started, killed = time.perf_counter(), 0
    sound = [Fault("none", module, '"""\n\nimport ', '"""\n\nimport ') for module in sorted({fault.module for fault in faults})]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for fault, verdict in zip(sound, pool.map(judge, sound), strict=True):
            if verdict.how != "SURVIVED":
                sys.stdout.write(f"without a fault, the tests of {fault.module}: {verdict.how}\n")
                return 1
        for fault, verdict in zip(faults, pool.map(judge, faults), strict=True):
            sys.stdout.write(f"{fault.module:8} {fault.name:{WIDTH}} {verdict.seconds:5.1f} s  {verdict.how}\n")
            sys.stdout.flush()
            killed += verdict.killed
    sys.stdout.write(f"{killed} of {len(faults)} faults killed in {time.perf_counter() - started:.0f} s\n")
    return 0 if killed == len(faults) else 1


if __name__ == "__main__":
    sys.exit(main())
