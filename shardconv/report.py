"""Reports: the plan before a run, what a run took after it, and listings, as tables for people and as data for programs.

report.json, whose keys are stable:

    source                 path of the source
    family                 whose names and shapes the source has
    layout                 whose the checkpoint has
    source_bytes           bytes of all tensors of the source
    target_bytes           bytes of all leaves of the target, as arrays in memory
    bytes_read             bytes read from the source's tensors, by the attempt of each unit that counts
    bytes_written          bytes given to the store: chunks after compression, with their indices and metadata
    read_amplification     bytes_read over the bytes of the tensors that are used; 1.0 means that each byte was read once
    write_amplification    bytes_written over target_bytes; under 1 with compression
    requests               read requests
    wall_seconds           from the command's start to the report, this run alone
    cpu_seconds            of all processes of this run: driver, workers, commit; not of Ray's own daemons
    peak_rss_bytes         of the heaviest worker of this run
    memory_budget_bytes    what each worker's buffers may take; the interpreter and its libraries come on top (some 0.1 GB)
    used_bytes             bytes of the source's tensors that the target is made of
    units                  {total, resumed (finished by earlier runs), retried (attempts that failed in this run)}
    stages                 wall seconds by stage: plan, prepare, start, units, commit, check, logits (where asked for), close
    throughput             {slice_seconds, bytes}: of the target, in slices of the time in which this run made units
    processes              [{role (driver, worker, commit, weights, logits), host, pid, cpu_seconds, peak_rss_bytes}]
    executor               where the units ran
    workers                how many units at a time
    checkpoint             path of the checkpoint
    versions               of shardconv, Python and the libraries
    check                  null if none was asked for, or {mode, equal, problems, weights (`verify.verdict.Verdict`), logits
                           (`verify.logit_verdict.LogitVerdict`)}, of which what was not asked for is null
    notes                  what the plan had to say

Figures of a conversion that was interrupted cover all of it where they speak of bytes, and its last run where they speak of time and
memory.
"""

import platform
import re
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

import shardconv
from shardconv.axes import Address, Dim
from shardconv.check_report import print_check
from shardconv.inspecting import Listing
from shardconv.page.words import count
from shardconv.plan import Leaf, Plan, Unit
from shardconv.progress import amount
from shardconv.run.driver import Outcome
from shardconv.sharding import Spec
from shardconv.throughput import throughput

LIBRARIES = ("jax", "ml_dtypes", "numpy", "orbax-checkpoint", "ray", "tensorstore")

Json = dict[str, object]


def figures(outcome: Outcome) -> Json:
    """What a conversion took: the content of report.json."""
    plan, records = outcome.plan, outcome.records.values()
    read, written, used = _total(records, "bytes_read"), _total(records, "bytes_written"), used_bytes(plan)
    processes = list(_processes(outcome))
    return {
        "source": plan.source.root,
        "family": plan.family,
        "layout": plan.layout,
        "source_bytes": plan.source.total_bytes,
        "target_bytes": plan.target_bytes,
        "bytes_read": read,
        "bytes_written": written,
        "read_amplification": _ratio(read, used),
        "write_amplification": _ratio(written, plan.target_bytes),
        "requests": _total(records, "requests"),
        "wall_seconds": sum(outcome.stages.values()),
        "cpu_seconds": sum(cast(float, process["cpu_seconds"]) for process in processes),
        "peak_rss_bytes": max((worker.peak_rss for worker in outcome.workers), default=0),
        "memory_budget_bytes": outcome.budget,
        "used_bytes": used,
        "units": {"total": len(plan.units), "resumed": outcome.resumed, "retried": outcome.retried},
        "stages": dict(outcome.stages),
        "throughput": throughput(outcome.finished, {unit.number: unit.bytes_written for unit in plan.units}),
        "processes": processes,
        "executor": outcome.where,
        "workers": outcome.slots,
        "checkpoint": outcome.checkpoint,
        "versions": versions(),
        "check": None if outcome.check is None else dict(outcome.check),
        "notes": list(plan.notes),
    }


def _total(records: Iterable[Mapping[str, object]], key: str) -> int:
    return sum(cast(int, record[key]) for record in records)


def _ratio(part: int, whole: int) -> float:
    return round(part / whole, 6) if whole else 1.0


def _processes(outcome: Outcome) -> Iterator[Json]:
    """Every process of the run; the driver is the worker too where there is one slot, and then it is listed once, as the worker."""
    host, workers = socket.gethostname(), outcome.workers
    if not any(worker.is_this_process for worker in workers):
        yield _process("driver", host, outcome.driver_pid, outcome.driver_cpu_seconds, outcome.driver_peak_rss)
    for worker in workers:
        cpu = outcome.driver_cpu_seconds if worker.is_this_process else worker.cpu_seconds
        yield _process("worker", worker.host, worker.pid, cpu, worker.peak_rss)
    if outcome.sealed is not None:
        yield _process("commit", host, outcome.sealed.pid, outcome.sealed.cpu_seconds, outcome.sealed.peak_rss)
    for role in ("weights", "logits"):
        part = None if outcome.check is None else cast(Mapping[str, Any] | None, outcome.check[role])
        if part is not None and "pid" in part:
            yield _process(role, host, part["pid"], part["cpu_seconds"], part["peak_rss_bytes"])


def _process(role: str, host: str, pid: int, cpu: float, peak: int) -> Json:
    return {"role": role, "host": host, "pid": pid, "cpu_seconds": round(cpu, 3), "peak_rss_bytes": peak}


def versions() -> dict[str, str]:
    """Versions of shardconv, Python and the libraries that are installed."""
    found = {"shardconv": shardconv.__version__, "python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def used_bytes(plan: Plan) -> int:
    """Bytes of the stored tensors that some leaf is made of, each counted once."""
    addresses = {id(part.source): part.source for leaf in plan.leaves for part in leaf.parts}
    keys = {key for address in addresses.values() for key, _ in address.keys()}
    inputs = (plan.computed[key].inputs if key in plan.computed else (plan.source.tensors[key],) for key in keys)
    tensors = (tensor for some in inputs for tensor in some)
    return sum(nbytes for _, _, nbytes in {(t.file, t.offset, t.nbytes) for t in tensors})


def print_summary(found: Json, console: Console) -> None:
    """The end of a run, for people: `figures` in a few lines."""
    stages, units = cast(dict[str, float], found["stages"]), cast(dict[str, int], found["units"])
    converting, target, written, read, peak, budget = (
        cast(int, number)
        for number in (
            stages.get("units", 0.0), found["target_bytes"], found["bytes_written"], found["bytes_read"], found["peak_rss_bytes"],
            found["memory_budget_bytes"],
        )
    )  # fmt: skip
    count = f"{units['total']} unit{'' if units['total'] == 1 else 's'}"
    resumed = f", {units['resumed']} by earlier runs" if units["resumed"] else ""
    retried = f", {units['retried']} attempt{'' if units['retried'] == 1 else 's'} failed" if units["retried"] else ""
    worked = bool(peak)  # a run that only commits has no workers
    rate = f", {amount(target / converting)}/s while converting" if converting and not units["resumed"] else ""
    times = ", ".join(f"{name} {seconds:.1f}" for name, seconds in stages.items())
    for label, text in (
        ("checkpoint", f"{found['checkpoint']}, {amount(target)} in {count}{resumed}{retried}"),
        ("time", f"{found['wall_seconds']:.1f} s{rate} ({times})"),
        ("cpu", f"{found['cpu_seconds']:.1f} s in all processes" + (f"; units by {found['executor']}" if worked else "")),
        ("read", f"{amount(read)} in {found['requests']:,} requests, {found['read_amplification']:.2f} x what is used"),
        ("written", f"{amount(written)}, {found['write_amplification']:.2f} x the target"),
        ("memory", f"heaviest worker {amount(peak)}, of which buffers may take {amount(budget)}" if worked else "no workers were needed"),
    ):
        console.print(f"{label:<12}{text}")
    for note in cast(list[str], found["notes"]):
        console.print(f"{'note':<12}{note}")
    if isinstance(check := found["check"], Mapping):
        print_check(check, console)


# ------------------------------------------------------------------------------------------------------------------ plan


def template(address: Address) -> str:
    """A name with its holes.

    >>> from shardconv.axes import address
    >>> template(address("layers.{layers}.w", "heads embed", {"layers": 2, "heads": 2, "embed": 4}))
    'layers.{layers}.w'
    """
    holes = (f"{{{' '.join(digit.axis for digit in hole.dim)}{f'+{hole.start}' if hole.start else ''}}}" for hole in address.holes)
    parts = address.name.split("{}")
    return parts[0] + "".join(hole + part for hole, part in zip(holes, parts[1:], strict=True))


def dims(address: Address) -> str:
    """Its dims, as they are written.

    >>> from shardconv.axes import address
    >>> dims(address("w", "(heads head_dim) embed", {"heads": 2, "head_dim": 3, "embed": 4}))
    '(heads head_dim) embed'
    """
    return " ".join(_dim(dim) for dim in address.dims)


def _dim(dim: Dim) -> str:
    axes = [digit.axis for digit in dim]
    return axes[0] if len(axes) == 1 else f"({' '.join(axes)})" if axes else "1"


def _spec(spec: Spec) -> str:
    return "replicated" if not any(spec) else f"({', '.join('-' if axes is None else str(axes) for axes in spec)})"


def _groups(plan: Plan) -> list[tuple[Leaf, int]]:
    """Leaves that are alike but for a number in their names: the first one, and how many there are."""
    counts: dict[tuple[object, ...], tuple[Leaf, int]] = {}
    for leaf in plan.leaves:
        key = (leaf.template, leaf.shape, leaf.dtype, leaf.chunk, leaf.inner)
        first, count = counts.get(key, (leaf, 0))
        counts[key] = (first, count + 1)
    return list(counts.values())


def _largest(plan: Plan) -> Unit:
    return max(plan.units, key=lambda unit: unit.bytes_written)


def plan_json(plan: Plan, *, ocdbt: bool) -> Json:
    """The plan as data; a plan exists only when nothing is unmapped or missing, so those two lists are empty."""
    source, used = plan.source, used_bytes(plan)
    return {
        "source": {"path": source.root, "format": source.format, "files": len(source.files), "tensors": len(source.tensors)},
        "family": plan.family,
        "layout": plan.layout,
        "tied": plan.tied,
        "source_bytes": source.total_bytes,
        "used_bytes": used,
        "target_bytes": plan.target_bytes,
        "bytes_read": plan.bytes_read,
        "read_amplification": _ratio(plan.bytes_read, used),
        "requests": plan.requests,
        "peak_bytes_per_worker": plan.peak_bytes,
        "units": len(plan.units),
        "windows": len(plan.windows),
        "processes": plan.processes,
        "largest_unit_bytes": _largest(plan).bytes_written,
        "files_to_write": files_to_write(plan, ocdbt=ocdbt),
        "mesh": {"axes": dict(plan.mesh.axes), "rules": {axis: list(rule) for axis, rule in plan.mesh.rules.items()}},
        "unmapped": [],
        "missing": [],
        "leaves": [_leaf_json(leaf) for leaf in plan.leaves],
        "notes": list(plan.notes),
        "digest": plan.digest(),
    }


def _leaf_json(leaf: Leaf) -> Json:
    sources = [
        {"param": part.param, "name": template(part.source), "dims": dims(part.source), "dtype": part.stored} for part in leaf.parts
    ]
    return {
        "name": leaf.name,
        "template": leaf.template,
        "sources": sources,
        "dims": [dims(part.target) for part in leaf.parts],
        "shape": list(leaf.shape),
        "dtype": leaf.dtype,
        "value": "exact" if leaf.exact else "rounds",
        "padding": leaf.zeros,
        "chunk": list(leaf.chunk),
        "inner_chunk": list(leaf.inner),
        "chunks": leaf.chunks,
        "partition_spec": [list(axes) if isinstance(axes, tuple) else axes for axes in leaf.spec],
        "bytes": leaf.nbytes,
    }


def files_to_write(plan: Plan, *, ocdbt: bool) -> int:
    """About how many files the checkpoint will have: a manifest and its data per unit, or one per chunk, and a few for the whole."""
    return 6 + (2 * len(plan.units) if ocdbt else sum(leaf.chunks + 1 for leaf in plan.leaves))


def print_plan(plan: Plan, console: Console, *, ocdbt: bool) -> None:
    """The plan for people: a line per group of leaves, or a few where the terminal is narrow, then what the run will take."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("target", "source", "dims", "shape", "dtype", "values", "chunk", "inner", "sharding"):
        table.add_column(heading, no_wrap=True)
    rows = [_plan_row(leaf, many) for leaf, many in _groups(plan)]
    for row in rows:
        table.add_row(*row)
    if _fits(table, console):
        console.print(table)
    else:
        for row in rows:
            _print_row(row, console)
    console.print()
    console.print(_plan_facts(plan, ocdbt=ocdbt))


def _plan_row(leaf: Leaf, count: int) -> tuple[str, ...]:
    if count == 1 and "{}" in leaf.template:  # a user's own model, whose layers are like no others
        leaf = replace(leaf, template=leaf.name)
    sources = [template(part.source) for part in leaf.parts]
    if "{}" in leaf.template:
        sources = [re.sub(r"(?<=\.)[0-9]+(?=\.)", "{}", source) for source in sources]
    return (
        leaf.template + (f" x {count}" if count > 1 else ""),
        "\n".join(sources),
        "\n".join(f"{dims(part.source)} -> {dims(part.target)}" for part in leaf.parts),
        _shape(leaf.shape),
        leaf.dtype,
        "exact" if leaf.exact else "rounds",
        _shape(leaf.chunk),
        _shape(leaf.inner),
        _spec(leaf.spec),
    )


def _print_row(row: tuple[str, ...], console: Console) -> None:
    """A group of leaves as a paragraph of short lines."""
    target, sources, how, shape, dtype, values, chunk, inner, spec = row
    console.print(target, style="bold")
    for source, change in zip(sources.splitlines(), how.splitlines(), strict=True):
        console.print(f"    {source}\n    {change}")
    console.print(f"    {shape} {dtype}, {values}, {spec}\n    chunk {chunk}, inner {inner}")


def _plan_facts(plan: Plan, *, ocdbt: bool) -> Table:
    source, used = plan.source, used_bytes(plan)
    facts = Table.grid(padding=(0, 2))
    rounds = sum(not leaf.exact for leaf in plan.leaves)
    held = f"{count(len(source.tensors), 'tensor')} in {count(len(source.files), 'file')}"
    facts.add_row("source", f"{source.root}: {amount(source.total_bytes)}, {held}")
    facts.add_row("target", f"{plan.layout}, {amount(plan.target_bytes)} in {len(plan.leaves)} arrays, {rounds} of which round")
    requests = "" if plan.windows else f" in {plan.requests:,} requests"  # on a mesh they depend on who has which devices
    least = "at least " if plan.windows else ""
    reads = f"{least}{amount(plan.bytes_read)}{requests}, {_ratio(plan.bytes_read, used):.2f} x what is used"
    facts.add_row("names", "none missing, none unmapped")
    facts.add_row("reads", reads)
    largest = amount(_largest(plan).bytes_written)
    facts.add_row("work", f"{count(len(plan.units), 'unit')}, the largest {largest}; about {files_to_write(plan, ocdbt=ocdbt)} files")
    facts.add_row("memory", f"{amount(plan.peak_bytes)} of buffers per worker")
    facts.add_row("mesh", ", ".join(f"{axis} {size}" for axis, size in plan.mesh.axes.items()) or "none: arrays are whole")
    if plan.windows:
        most = max(window.stop - window.start for window in plan.windows)
        many = f"{plan.processes} process{'' if plan.processes == 1 else 'es'}"
        said = f"{len(plan.windows)}, of at most {most} arrays on the mesh at once; {many} in all"
        facts.add_row("windows", said)
    for note in plan.notes:
        facts.add_row("note", note)
    return facts


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


# --------------------------------------------------------------------------------------------------------------- listing


def listing_json(listing: Listing) -> Json:
    """A listing as data."""
    tensors = [
        {"name": e.name, "shape": list(e.shape), "dtype": e.dtype, "bytes": e.nbytes, "where": e.where}
        | ({"chunk": list(e.chunk)} if e.chunk is not None else {})
        for e in listing.entries
    ]
    total = {"tensors": len(tensors), "bytes": listing.nbytes, "files": len({e.where for e in listing.entries})}
    return {"path": listing.path, "format": listing.format, "total": total, "tensors": tensors, "notes": list(listing.notes)}


def print_listing(listing: Listing, console: Console) -> None:
    """A listing for people: a line per tensor, or two where the terminal is narrow."""
    chunked = any(entry.chunk is not None for entry in listing.entries)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("name", "shape", "dtype", "bytes", *(["chunk"] if chunked else []), "in"):
        table.add_column(heading, no_wrap=True, justify="right" if heading == "bytes" else "left")
    for entry in listing.entries:
        chunk = [_shape(entry.chunk)] if entry.chunk is not None else []
        table.add_row(entry.name, _shape(entry.shape), entry.dtype, f"{entry.nbytes:,}", *chunk, entry.where)
    if not listing.entries or _fits(table, console):
        console.print(table)
    else:
        for entry in listing.entries:
            chunk = [f"chunk {_shape(entry.chunk)}"] if entry.chunk is not None else []
            facts = [f"{_shape(entry.shape)} {entry.dtype}", f"{entry.nbytes:,} bytes", *chunk, f"in {entry.where}"]
            console.print(f"{entry.name}\n    {', '.join(facts)}")
    places = len({entry.where for entry in listing.entries})
    where = count(places, "directory", "directories") if listing.format == "orbax" else count(places, "file")
    console.print(f"{count(len(listing.entries), 'tensor')}, {amount(listing.nbytes)}, {where}, {listing.format}")
    for note in listing.notes:
        console.print(f"note: {note}")


def _fits(table: Table, console: Console) -> bool:
    return Measurement.get(console, console.options.update(max_width=10**6), table).maximum <= console.width
