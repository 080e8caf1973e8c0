"""The proof of the proof: every fault that users suffer is seeded into a conversion, and `--check all` has to see it.

    python scripts/faults/suite.py [WORD]              every fault (with WORD in its name); a table, exit 1 where one is not caught
    python scripts/faults/suite.py --clean N [--seed]  N sound conversions of random models; exit 1 where a check complains

Both together are `make faults`, whose table is in docs/faults.md.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]


def faults(word: str) -> int:
    """Seed the faults whose names have a word; how many were not caught."""
    from catalogue import FAULTS
    from pipeline import convert_and_check

    missed = 0
    print("| fault | seeded into | weights | logits |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, fault in FAULTS.items():
            if word not in name:
                continue
            found = convert_and_check(Path(folder), fault)
            seen = ["caught" if part else "-" for part in (found.weights, found.logits)]
            missed += not (found.weights or found.logits)
            print(f"| {name} | {fault.where} | {seen[0]} | {seen[1]}{times(found.ratio)} |", flush=True)
    print(f"\n{missed} not caught", flush=True)
    return missed


def times(ratio: float | None) -> str:
    """How large a difference of logits was, in what is allowed."""
    return "" if ratio is None else f", {ratio:.2g} x" if ratio >= 1 else f" ({ratio:.2f} x)"


def clean(count: int, seed: int) -> int:
    """Convert random models without a fault; how many were complained of."""
    from pipeline import Fault, convert_and_check
    from random_models import random_conversion

    alarms, largest, started = 0, 0.0, time.perf_counter()
    for number in range(count):
        conversion = random_conversion(seed * 1000 + number)
        with tempfile.TemporaryDirectory() as folder:
            found = convert_and_check(Path(folder), Fault("nowhere", conversion))
        largest = max(largest, found.ratio or 0.0)
        if found.weights or found.logits:
            alarms += 1
            print(f"FALSE ALARM {conversion}\n  {found}", flush=True)
        elif number % 10 == 9:
            print(f"{number + 1} sound, {time.perf_counter() - started:.0f} s", flush=True)
    print(f"{count} random conversions, {alarms} false alarms; largest difference of logits {largest:.2f} of what is allowed", flush=True)
    return alarms


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("word", nargs="?", default="", help="only faults with this in their name")
    parser.add_argument("--clean", type=int, metavar="N", help="no faults: N sound conversions")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    sys.exit(bool(faults(chosen.word) if chosen.clean is None else clean(chosen.clean, chosen.seed)))


if __name__ == "__main__":
    main()
