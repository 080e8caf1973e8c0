"""Coverage-guided fuzzing of what reads other people's bytes: the safetensors header, the index, PyTorch files, and addresses.

    python scripts/fuzz/run.py safetensors|index|pickle|address [--minutes 30] [--out build/fuzz]

Atheris mutates valid files towards code that was not reached before. For each input, `targets` says what must hold: only the documented
error comes out; within a second; and what is accepted, a reader that shares no code reads in the same way. An input that breaks this is
kept once for each place in the code, beside its traceback, and the search goes on; one that hangs or takes over 2 GB ends the process,
which is started again. The last line has the figures, also as OUT/TARGET/figures.json; the exit code is 1 where anything was found.

It needs the extra `fuzz`.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
# Slow by the clock says little on a busy machine; child.py measures the time of the processor.
LIMITS = ["-timeout=60", "-report_slow_units=1000", "-rss_limit_mb=2048", "-max_len=8192", "-len_control=20", "-print_final_stats=1"]


def main() -> None:
    from seeds import SEEDS, dictionary

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=SEEDS)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"))
    asked = parser.parse_args()
    folder = (asked.out / asked.target).absolute()
    for name in "corpus", "findings", "killers":
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(SEEDS[asked.target]()):
        (folder / "corpus" / f"seed-{number}").write_bytes(seed)
    (folder / "words").write_text(dictionary(asked.target))
    print(json.dumps(fuzz(asked.target, folder, 60 * asked.minutes)))
    sys.exit(any(any((folder / name).iterdir()) for name in ("findings", "killers")))


def fuzz(target: str, folder: Path, seconds: float) -> dict[str, object]:
    """Fuzz for a time, in as many processes one after another as it takes."""
    begun, executed = time.monotonic(), 0
    while (left := seconds - (time.monotonic() - begun)) > 5:
        options = [f"-max_total_time={int(left)}", f"-dict={folder / 'words'}", f"-artifact_prefix={folder / 'killers'}/"]
        command = [sys.executable, str(HERE / "child.py"), target, str(folder), str(folder / "corpus"), *LIMITS, *options]
        with open(folder / "log", "w+") as log:
            subprocess.run(command, stdout=log, stderr=log, check=False)
            log.seek(0)
            text = log.read()
        counted = re.findall(r"stat::number_of_executed_units:\s+(\d+)", text) or re.findall(r"^#(\d+)", text, re.MULTILINE)
        if not counted:
            sys.exit(f"the fuzzer did not start; see {folder / 'log'}")
        executed += int(counted[-1])
    figures = {
        "target": target,
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "minutes of a core": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime / 60, 1),
        "executions": executed,
        "last process": json.loads((folder / "counts.json").read_text()),
        "corpus": len(list((folder / "corpus").iterdir())),
        "findings": sorted(path.name for name in ("findings", "killers") for path in (folder / name).glob("*") if path.suffix != ".txt"),
    }
    (folder / "figures.json").write_text(json.dumps(figures, indent=2))
    return figures


if __name__ == "__main__":
    main()
