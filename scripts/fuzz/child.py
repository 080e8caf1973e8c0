"""The process that fuzzes: `child.py TARGET FOLDER [libFuzzer's arguments]`, as run.py starts it."""

import json
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent))
with atheris.instrument_imports(include=["shardconv.formats", "shardconv.axes", "shardconv.errors"]):
    import shardconv.axes
    import shardconv.formats.index
    import shardconv.formats.pytorch
    import shardconv.formats.safetensors  # noqa: F401
from targets import TARGETS

SECONDS = 1.0  # more than any input of 8 KiB needs


def watched(target: Callable[[bytes], str], folder: Path) -> Callable[[bytes], None]:
    """The target with what it raises kept, once for each place in the code."""
    counts: Counter[str] = Counter()

    def one(data: bytes) -> None:
        begun = time.process_time()
        try:
            outcome = target(data)
            if time.process_time() - begun > SECONDS:
                raise TimeoutError(f"{outcome} after {time.process_time() - begun:.1f} s")
        except Exception as error:  # noqa: BLE001  whatever else comes out is what is looked for
            outcome = "finding"
            place = traceback.extract_tb(error.__traceback__)[-1]
            kept = folder / "findings" / f"{type(error).__name__}-{Path(place.filename).stem}-{place.lineno}"
            if not kept.exists():
                kept.write_bytes(data)
                kept.with_suffix(".txt").write_text(traceback.format_exc())
        counts[outcome] += 1
        if not sum(counts.values()) % 1000:
            (folder / "counts.json").write_text(json.dumps(counts))

    return one


if __name__ == "__main__":
    name, folder, *arguments = sys.argv[1:]
    (Path(folder) / "counts.json").write_text("{}")
    atheris.Setup([sys.argv[0], *arguments], watched(TARGETS[name], Path(folder)))
    atheris.Fuzz()
