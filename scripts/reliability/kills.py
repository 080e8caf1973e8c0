"""Kill a conversion at seeded random moments and at every named step of its end; run the same command again; compare.

    python scripts/reliability/kills.py WORK [--local 200] [--ray 20] [--steps [WAY ...]] [--seed 1] [--jobs 2]

A small model is converted undisturbed once for each way of converting (`WAYS`). Then each case is one conversion whose first runs, one to
four of them, are killed at a random moment: SIGKILL to the driver, a worker, the process that commits, the driver's process group,
everything at once, and with Ray its raylet or its GCS; or SIGSTOP, for a worker that hangs. Then the same command is run until it is done.
Every case asserts:

- at the kill: no directory is there that Orbax, a manager of checkpoints or `shardconv inspect` takes for complete, unless it is; an
  earlier output that is to be replaced is there, whole; at most one unit per worker was begun and not recorded; no process is left
- a run that lost a worker goes on by itself; any other ends with code 5 or a signal, and the next does only what was not recorded
- in the end: every array bit for bit and all metadata but `looking.VOLATILE` equal the undisturbed checkpoint's, and nothing else is left

A line per kill, a summary, and exit code 1 on any violation.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from looking import Case, Checkpoint, Judge, lost_units
from victims import Running, present, remaining, strike

from shardconv.synth import synthesise

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 6,
    "vocab_size": 2000,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
WORKERS = 2
LOCAL = ("driver", "worker", "commit", "group", "everything", "hang")
RAY = ("driver", "worker", "raylet", "everything", "gcs", "commit")
CHAIN = 4  # runs of one conversion that are killed, at most
WENT_ON = ("worker", "hang")  # a run that loses one of these goes on by itself
MOST_RUNS = 3  # after the last kill; one is enough


@dataclass(frozen=True)
class Way:
    """A way of converting: who works, which layout, and whether an earlier checkpoint is replaced."""

    executor: str
    layout: str
    overwrite: bool
    check: str

    @property
    def name(self) -> str:
        """A word for lines and directories."""
        more = {"overwrite": self.overwrite, "check": self.check != "none"}
        return "-".join([self.executor, self.layout, *(word for word, said in more.items() if said)])

    def arguments(self) -> tuple[str, ...]:
        """Of the command line."""
        return ("--check", self.check, *(["--overwrite"] if self.overwrite else []))


WAYS = (
    Way("local", "flat", False, "none"),
    Way("local", "maxtext", False, "weights"),
    Way("local", "flat", True, "none"),
    Way("local", "maxtext", True, "none"),
)
RAY_WAYS = (Way("ray", "maxtext", False, "none"), Way("ray", "flat", True, "none"))


@dataclass(frozen=True)
class Known:
    """What a way gives undisturbed, and how long it takes."""

    new: Checkpoint
    earlier: Path | None
    judge: Judge
    seconds: float
    units: int


@dataclass
class Result:
    """One case: what was done to it, what came of it, and what is wrong."""

    line: str = ""
    victim: str = ""
    killed: bool = False
    lost: int = 0
    runs: int = 0
    wrongs: list[str] = field(default_factory=list)


def make_case(work: Path, name: str, way: Way, earlier: Path | None, dtype: str = "source") -> Case:
    """A directory with a config, and the earlier checkpoint."""
    step, item = ("0", "items") if way.layout == "maxtext" else ("", "")
    case = Case(work / name, step, item)
    shutil.rmtree(case.root, ignore_errors=True)
    case.root.mkdir(parents=True)
    if earlier is not None:
        shutil.copytree(earlier, case.root / "out")
    place = 'step = 0\nitem = "items"\n' if step else ""
    (case.root / "config.toml").write_text(
        f'[source]\npath = "{work}/source"\n[target]\nlayout = "{way.layout}"\nscan_layers = false\ndtype = "{dtype}"\n'
        f'[output]\npath = "out"\n{place}'
        f'[workers]\nexecutor = "{way.executor}"\ncount = {WORKERS}\nmemory_budget = "64MiB"\n'
    )
    return case


def undisturbed(work: Path, way: Way) -> Known:
    """Convert twice: what will be replaced, if that is asked for, and the result that all others are compared with."""
    earlier = old = None
    if way.overwrite:
        before = Way(way.executor, way.layout, overwrite=False, check="none")
        case = make_case(work, f"{way.name}-earlier", before, None, dtype="float32")
        _finish(case, before)
        earlier, old = case.root / "out", case.load(case.checkpoint)
    case = make_case(work, f"{way.name}-undisturbed", way, earlier)
    running = _finish(case, way)
    seconds = time.monotonic() - running.begun
    new = case.load(case.checkpoint)
    return Known(new, earlier, Judge(new, old), seconds, running.count("finished"))


def _finish(case: Case, way: Way) -> Running:
    running = Running.start(case.root, "undisturbed", way.arguments())
    if running.wait() != 0:
        raise SystemExit(f"undisturbed: {running.log.read_text()}")
    return running


def run_case(work: Path, number: int, way: Way, known: Known, victims: Sequence[str], rng: random.Random) -> list[Result]:
    """Kill each run at a random moment, as many as there are victims; then go on to the end, and compare."""
    case, results = make_case(work, f"case{number}", way, known.earlier), []
    for victim in victims:
        result = Result(victim=victim, runs=len(results) + 1)
        results.append(result)
        running = Running.start(case.root, f"run{result.runs}", way.arguments())
        moment = rng.uniform(0, known.seconds) if victim in ("driver", "group", "everything") else rng.uniform(0, known.seconds / 4)
        target = _wait_for(running, victim, moment)
        if target is None:
            break
        processes, at, stage = running.tree(), time.monotonic() - running.begun, _stage(running)
        strike(running, victim, target)
        result.killed = True
        result.line = f"{number:4d}.{result.runs} {way.name:26s} {victim:10s} at {at:5.2f} s ({stage})"
        _after(case, known, victim, running, processes, result)
        if running.wait() == 0:
            break
    _end(case, way, known, running, results[-1])
    if not any(result.wrongs for result in results):
        for path in [case.root, *work.glob(f"case{number}.*.log")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return results


def _stage(running: Running) -> str:
    names = [str(found["name"]) for found in running.events() if found.get("event") == "stage"]
    return names[-1] if names else "imports"


def _wait_for(running: Running, victim: str, moment: float):  # type: ignore[no-untyped-def]
    """The process to hit: the one that is there at the moment, counted from when there was one."""
    since = None
    while running.process.poll() is None:
        there = present(running, victim)
        since = since or (time.monotonic() if there else None)
        if there and since is not None and (victim in WENT_ON or time.monotonic() - since >= moment):
            return there[int(moment * 1000) % len(there)]
        time.sleep(0.01)
    return None


def _after(case: Case, known: Known, victim: str, running: Running, processes: list, result: Result) -> None:  # type: ignore[type-arg]
    """Look at what the kill has left."""
    if victim in WENT_ON:
        return
    code = running.wait()
    if code not in (-9, 5) and not (code == 0 and victim in ("commit", "raylet", "gcs")):
        result.wrongs.append(f"the run ended with code {code}")
    result.wrongs += remaining(processes)
    result.wrongs += known.judge.wrongs(case)
    result.lost = lost_units(case)
    if result.lost > WORKERS:
        result.wrongs.append(f"{result.lost} units were begun and not recorded, with {WORKERS} workers")


def _end(case: Case, way: Way, known: Known, running: Running, result: Result) -> None:
    """Run the same command until it is done, and compare."""
    code, begun = running.wait(), result.runs
    while code != 0 and result.runs < begun + MOST_RUNS:
        result.runs += 1
        recorded = len(list((case.state / "done").glob("*.json"))) if (case.state / "job.json").exists() else 0
        running = Running.start(case.root, f"run{result.runs}", way.arguments())
        code = running.wait()
        if code == 2 and not way.overwrite and "the output exists" in running.log.read_text() and not (case.state / "job.json").exists():
            code = 0  # it was killed when nothing but tidying was left: the state is closed, and the output is there
            shutil.rmtree(case.state)
            break
        if code == 0 and running.count("finished") > known.units - recorded + running.count("retried"):
            result.wrongs.append(f"{running.count('finished')} units were done again, and {recorded} of {known.units} were recorded")
    if result.victim in WENT_ON and result.killed:
        retried = running.count("retried")
        result.lost = retried
        if result.runs > begun or retried > 1:
            result.wrongs.append(f"a lost worker cost {retried} units and {result.runs} runs")
    if code != 0:
        result.wrongs.append(f"run {result.runs} ended with code {code}: {running.log.read_text()[-1500:]}")
        return
    different = case.load(case.checkpoint).differences(known.new)
    if different:
        result.wrongs.append(f"the checkpoint is another: {different[:5]}")
    left = {path.name for path in case.root.iterdir()} - {"config.toml", "out", "out.shardconv"}
    left |= {path.name for path in case.state.iterdir()} - {"report.json", "report.html"} if case.state.exists() else set()
    if left:
        result.wrongs.append(f"left behind: {sorted(left)}")


def steps_of(work: Path, way: Way, known: Known, role: str) -> list[tuple[int, str]]:
    """The named steps of a role: of those whose names differ in digits alone, the first and the last."""
    case = make_case(work, f"{way.name}-steps-{role}", way, known.earlier)
    log = work / f"{way.name}-{role}.steps"
    log.unlink(missing_ok=True)
    running = Running.start(case.root, "list", way.arguments(), _step(role, -1, case, log))
    if running.wait() != 0:
        raise SystemExit(running.log.read_text())
    alike: dict[str, list[tuple[int, str]]] = {}
    for line in log.read_text().splitlines():
        number, step = line.split(" ", 1)
        alike.setdefault("".join("#" if c in "0123456789abcdef" else c for c in step), []).append((int(number), step))
    return sorted({place for places in alike.values() for place in (places[0], places[-1])})


def _step(role: str, number: int, case: Case, log: Path) -> dict[str, str]:
    return {"SHARDCONV_STEP": json.dumps([role, number, str(case.root), str(log)])}


def run_step(work: Path, way: Way, known: Known, role: str, number: int, step: str) -> list[Result]:
    """Kill before one named step, go on, compare."""
    case = make_case(work, f"step-{way.name}-{role}-{number}", way, known.earlier)
    log = work / f"{case.root.name}.steps"
    running = Running.start(case.root, "run1", way.arguments(), _step(role, number, case, log))
    code = running.wait()
    result = Result(victim=f"{role} at a step", killed=code != 0, runs=1)
    result.line = f"     {way.name:30s} {role} before {step}"
    if code != (-9 if role == "driver" else 5) or not log.read_text().splitlines()[-1].startswith(f"{number} "):
        result.wrongs.append(f"the run ended with code {code}, and not at this step")
    result.wrongs += known.judge.wrongs(case)
    result.lost = lost_units(case)
    _end(case, way, known, running, result)
    if not result.wrongs:
        for path in [case.root, *work.glob(f"{case.root.name}.*")]:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    return [result]


def cases(work: Path, options: argparse.Namespace, known: dict[Way, Known], pool: ThreadPoolExecutor) -> Iterator[Result]:
    """All of them, in the order in which they end."""
    rng = random.Random(options.seed)
    futures, number = [], 0
    for ways, kinds, kills in ((WAYS, LOCAL, options.local), (RAY_WAYS, RAY, options.ray)):
        while kills > 0:
            own = random.Random(rng.random())
            victims = [own.choice(kinds) for _ in range(min(kills, own.randint(1, CHAIN)))]
            victims = victims[: next((n + 1 for n, victim in enumerate(victims) if victim in WENT_ON), len(victims))]
            way = ways[number % len(ways)]
            futures.append(pool.submit(run_case, work, number, way, known[way], victims, own))
            number, kills = number + 1, kills - len(victims)
    for way in _stepped(options):
        for role in ("commit", "driver"):
            for step_number, step in steps_of(work, way, known[way], role):
                futures.append(pool.submit(run_step, work, way, known[way], role, step_number, step))
    for future in as_completed(futures):
        try:
            yield from future.result()
        except subprocess.TimeoutExpired as error:
            yield Result(line=" ".join(map(str, error.cmd)), victim="hung", wrongs=[str(error)])


def _stepped(options: argparse.Namespace) -> list[Way]:
    return [way for way in WAYS if way.name in options.steps]


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="a directory to work in; removed at the end unless something is wrong")
    parser.add_argument("--local", type=int, default=200)
    parser.add_argument("--ray", type=int, default=20)
    names = [way.name for way in WAYS]
    parser.add_argument("--steps", nargs="*", choices=names, default=names, help="the ways of converting in which each step is killed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True)
    (work / "model.json").write_text(json.dumps(MODEL))
    synthesise(str(work / "model.json"), str(work / "source"), sparse=False, seed=1, dtype="bfloat16", shard_bytes=1_000_000)
    begun = time.monotonic()
    ways = (*(WAYS if options.local else _stepped(options)), *(RAY_WAYS if options.ray else ()))
    known = {way: undisturbed(work, way) for way in ways}
    for way, found in known.items():
        print(f"undisturbed {way.name}: {found.units} units, {found.seconds:.1f} s", flush=True)
    seen, lost, bad = Counter(), Counter(), 0  # type: ignore[var-annotated]
    with ThreadPoolExecutor(options.jobs) as pool:
        for result in cases(work, options, known, pool):
            if not result.killed and not result.wrongs:
                seen["ended before its kill"] += 1
                continue
            seen[result.victim] += 1
            lost[result.lost] += 1
            bad += bool(result.wrongs)
            verdict = "; ".join(result.wrongs) or f"run {result.runs}: sound, {result.lost} redone"
            print(f"{result.line} -> {verdict}", flush=True)
    print(f"{sum(seen.values())} cases in {time.monotonic() - begun:.0f} s: {dict(seen)}")
    print(f"units redone per kill: {dict(sorted(lost.items()))}; violations: {bad}")
    if not bad:
        shutil.rmtree(work)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
