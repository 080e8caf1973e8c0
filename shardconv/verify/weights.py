"""The check of the weights, whole: what should be there, what is there, and every leaf of the one held against the other.

    names      leaves that are missing or too many
    shapes     and dtypes of those that are there
    values     by tasks, on workers (`look`): every element up to a size, boxes of each leaf beyond it
    checksums  made again of what was read back, and held against the checkpoint's own metadata

Nothing here is fast on purpose but the values; nothing stops at the first difference. One problem is reported for leaves that are alike.
"""

import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import xxhash

from shardconv.boxes import chunk_box, grid_shape
from shardconv.errors import Problem
from shardconv.run.heartbeat import memory, tell_compared
from shardconv.verify import addresses, second
from shardconv.verify.causes import Doubt
from shardconv.verify.compare import Odd
from shardconv.verify.look import Place, Sight, Task, opened
from shardconv.verify.pool import Workers, at_work
from shardconv.verify.request import Request
from shardconv.verify.sampling import boxes
from shardconv.verify.statement import Reference
from shardconv.verify.stored import LOST, METADATA, Stored, StoredLeaf
from shardconv.verify.tensors import numpy_dtype
from shardconv.verify.verdict import Verdict

# A worker compares some 0.5 GB a second, so this much takes it half a minute, which nobody minds after a conversion that read and wrote as
# much; up to here every element is looked at. Half would leave an 8B model on two workers to samples; twice would be felt.
WHOLE_PER_WORKER = 16 << 30
# Boxes of each leaf beyond that, besides those that every slice and corner has anyway.
BOXES = 64
# Bytes of chunks in one task, and boxes in one: enough that starting it does not show, few enough that workers end together.
TASK_BYTES, TASK_BOXES = 128 << 20, 256
TELL = 0.5  # seconds between two words on how far it is, as heartbeats have them
# Beginnings of causes that leaves of different names may share.
COMMON = ("the factor", "the summand", "RoPE order", "rounded through", "cut off")
# Causes that are looked for: of more leaves than these no user reads.
DOUBTS = 16


def check(request: Request) -> Verdict:
    """Compare a checkpoint with its source; what differs is in the verdict.

    Raises InputError where the source cannot be read, CheckError where the checkpoint cannot, RunError where a worker dies.
    """
    opened.cache_clear()  # what this process has open may be an earlier checkpoint of the same place
    stored = Stored(request.folder)
    where = (os.path.join(stored.folder, METADATA), request.plan.source.root)
    with at_work(request.executor, request.workers, request.address, request.memory, *where) as workers:
        return _Check(request, stored, workers).run()


@dataclass
class _Check:
    request: Request
    stored: Stored
    workers: Workers
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def run(self) -> Verdict:
        """The whole check."""
        started, cpu = time.perf_counter(), time.process_time()
        request, plan = self.request, self.request.plan
        place = Place(request.folder, plan.source.root, tuple(plan.source.files), plan.source.prefix, tuple(plan.computed.values()))
        stored = Stored(request.folder)
        references, independent = self._references(place)
        sound = self._compare_trees(references, stored)
        whole = request.sample == 0 or (request.sample is None and plan.target_bytes <= WHOLE_PER_WORKER * self.workers.count)
        tasks = [task for reference in sound for task in self._tasks(place, reference, stored.leaf(reference.name), whole)]
        sights = self._look(tasks)
        made = self._compare_checksums(sights, stored) if whole else {}
        self._say({name: f"cannot be read back: {s.unreadable}" for name, s in sights.items() if s.unreadable}, LOST)
        self._explain(place, {reference.name: reference for reference in sound}, sights, made)
        self._compare_promises(sound, sights)
        odd = self._odd(sights)
        return Verdict(
            problems=tuple(self.problems),
            notes=tuple(self.notes),
            independent=independent,
            leaves=len(sights),
            rounded=sum(not leaf.exact for leaf in plan.leaves if leaf.name in sights),
            elements=sum(sight.elements for sight in sights.values()),
            nbytes=sum(sights[r.name].elements * numpy_dtype(r.dtype).itemsize for r in sound),
            whole=whole,
            boxes=sum(len(task.boxes) for task in tasks),
            seed=request.seed,
            checksums=len(made),
            nan=odd.nan,
            inf=odd.inf,
            executor=self.workers.executor,
            workers=self.workers.count,
            pid=os.getpid(),
            seconds=time.perf_counter() - started,
            cpu_seconds=time.process_time() - cpu + self.workers.cpu_seconds,
            peak_rss=max(memory()[1], self.workers.peak_rss),
        )

    def _references(self, place: Place) -> tuple[list[Reference], bool]:
        plan = self.request.plan
        stated = second.references(place.tensors(), plan.source.config or {}, plan.family, self.request.choices)
        if stated is not None:
            return stated, True
        whose = f"no independent statement of {plan.family} in the {plan.layout} layout" if plan.family else f"{plan.layout} is your own"
        fault = "table" if plan.family else "mapping: run your model beside PyTorch's for that"
        self.notes.append(f"{whose}: compared by the plan's own addresses, which finds damaged values and not a wrong {fault}")
        found, lost = addresses.references(plan)
        for name in lost:
            fact = f"{name} was not compared: its address is no einops pattern"
            self.problems.append(Problem(fact, "--check none leaves it at that"))
        return found, False

    def _compare_trees(self, references: Sequence[Reference], stored: Stored) -> list[Reference]:
        """Names, shapes and dtypes; the references whose values can be compared."""
        wanted, there = {reference.name for reference in references}, set(stored.names)
        uncompared = {problem.fact.split()[0] for problem in self.problems}
        self._say(dict.fromkeys(sorted(wanted - there), "is not in the checkpoint"), "the source has it, and it was not written")
        self._say(dict.fromkeys(sorted(there - wanted - uncompared), "is in the checkpoint"), "nothing in the source belongs there")
        wrong, sound = {}, []
        for reference in references:
            if reference.name not in there:
                continue
            leaf = stored.leaf(reference.name)
            if leaf.shape != reference.shape:
                wrong[reference.name] = f"has shape {_by(leaf.shape)}, and should have {_by(reference.shape)}"
            elif leaf.dtype != reference.dtype:
                wrong[reference.name] = f"is {leaf.dtype}, and should be {reference.dtype}"
            else:
                sound.append(reference)
        self._say(wrong, "")
        return sound

    def _say(self, facts: Mapping[str, str], remedy: str) -> None:
        """One problem for all leaves that differ in nothing but numbers and have the same fact."""
        for first, more in _alike(facts):
            self.problems.append(Problem(f"{first} {facts[first]}{more}", remedy))

    def _tasks(self, place: Place, reference: Reference, leaf: StoredLeaf, whole: bool) -> Iterator[Task]:
        memory = self.request.memory
        if not whole:
            some = boxes(reference, leaf.chunk, self.request.sample or BOXES, self.request.seed)
            for start in range(0, len(some), TASK_BOXES):
                yield Task(place, reference, some[start : start + TASK_BOXES], memory, None)
            return
        chunk = leaf.chunk
        count = math.prod(grid_shape(leaf.shape, chunk))
        step = max(TASK_BYTES // max(math.prod(chunk) * numpy_dtype(leaf.dtype).itemsize, 1), 1)
        for start in range(0, count, step):
            some = tuple(chunk_box(leaf.shape, chunk, number) for number in range(start, min(start + step, count)))
            yield Task(place, reference, some, memory, start)

    def _look(self, tasks: Sequence[Task]) -> dict[str, Sight]:
        tasks = sorted(tasks, key=lambda task: -task.nbytes)  # so that workers end together
        sights = {task.reference.name: Sight(task.reference.name) for task in tasks}
        done, told = 0, self._tell(0, total := sum(task.nbytes for task in tasks))
        for number, sight in self.workers.answers("shardconv.verify.look:look", tasks):
            sights[sight.leaf].add(sight)
            done += tasks[number].nbytes
            if time.monotonic() - told >= TELL or done == total:
                told = self._tell(done, total)
        return sights

    def _tell(self, done: int, total: int) -> float:
        """Say how far the check is; the moment at which it was said."""
        if self.request.progress:
            tell_compared(self.request.progress, done, total)
        return time.monotonic()

    def _compare_promises(self, references: Sequence[Reference], sights: Mapping[str, Sight]) -> None:
        """A leaf that has what it should, but whose values change where the plan calls them exact."""
        exact = {leaf.name for leaf in self.request.plan.leaves if leaf.exact}
        broken = {}
        for reference in references:
            changes = any((origin.scale, origin.shift) != (1.0, 0.0) for origin in reference.origins)
            if changes and reference.name in exact and not sights[reference.name].wrong:
                broken[reference.name] = "has its values scaled or shifted, as it should, and the plan calls it exact"
        self._say(broken, "")

    def _compare_checksums(self, sights: Mapping[str, Sight], stored: Stored) -> dict[str, bool]:
        """Whether each leaf has the checksum that the checkpoint says it was written with; those that it says nothing of are left out."""
        said = (stored.custom.get("shardconv") or {}).get("checksums") or {}
        if not said:
            self.notes.append("the checkpoint has no checksums in its metadata")
        found = {}
        for name in said.keys() & {name for name, sight in sights.items() if not sight.unreadable}:
            whole = xxhash.xxh3_64()
            for _, digest in sorted(sights[name].digests.items()):
                whole.update(bytes.fromhex(digest))
            found[name] = whole.hexdigest() == said[name]
        wrong = {name: "has not the checksum that it was written with" for name, same in sorted(found.items()) if not same}
        self._say({name: fact for name, fact in wrong.items() if not sights[name].wrong}, "the metadata is of another checkpoint")
        return found

    def _explain(
        self, place: Place, references: Mapping[str, Reference], sights: Mapping[str, Sight], checksums: Mapping[str, bool]
    ) -> None:
        """A problem for each kind of leaf that is wrong, with the likely cause."""
        wrong = [name for name in references if name in sights and sights[name].wrong]
        doubts, asked = [], []
        for name in wrong[:DOUBTS]:
            first = sights[name].first
            if first is not None:
                asked.append(name)
                doubts.append(Doubt(place, references[name], first.index, self.request.memory))
        causes = {asked[number]: cause for number, cause in self.workers.answers("shardconv.verify.causes:explain", doubts)}
        groups: dict[tuple[str, str], list[str]] = {}
        for name in wrong:
            cause = causes.get(name, "")
            groups.setdefault(("" if cause.startswith(COMMON) else _template(name), _template(cause)), []).append(name)
        for names in groups.values():
            self.problems.append(_difference(sights[names[0]], causes.get(names[0], ""), checksums.get(names[0]), names[1:]))

    def _odd(self, sights: Mapping[str, Sight]) -> Odd:
        """The values that are not finite in all of the checkpoint, and a note where the source has fewer."""
        total = Odd()
        for sight in sights.values():
            total = total.plus(sight.found)
            if sight.found != sight.source and not sight.wrong:
                had = f"its source has {sight.source.nan} and {sight.source.inf}"
                what = f"{sight.leaf} has {sight.found.nan} NaN and {sight.found.inf} infinite values, {had}"
                self.notes.append(f"{what}: they are too large for its dtype")
        return total


def _difference(sight: Sight, cause: str, checksum: bool | None, others: Sequence[str]) -> Problem:
    one = sight.first
    if one is None:
        raise ValueError(f"{sight.leaf}: nothing is wrong")
    at = ", ".join(map(str, one.index))
    origin = f", from {one.key}" if one.key else ""
    where = ", ".join(f"{start}:{stop}" for start, stop in sight.where or ())
    fact = f"{sight.leaf}[{at}] is {one.found}, and should be {one.expected}{origin}"
    fact += f"\n{sight.wrong:,} of {sight.elements:,} elements differ, within [{where}]"
    if checksum is not None:
        fact += "; its checksum says that it was " + ("written so" if checksum else "changed after it was written")
    if others:
        fact += f"\nand {len(others)} more leaves like it: {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}"
    return Problem(fact, cause)


def _template(text: str) -> str:
    """The text without the numbers of layers, experts and the like; `wi_0` keeps its own."""
    return re.sub(r"(?<=[. ])[0-9]+(?=[.,: ]|$)|(?<=layers_)[0-9]+", "{}", text)


def _alike(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Of names that differ in nothing but numbers the first, and how many more there are in words."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_template(name), []).append(name)
    for found in groups.values():
        yield found[0], f" (and {len(found) - 1} more like it)" if len(found) > 1 else ""


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"
