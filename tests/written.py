"""Checkpoints for the tests of the check: tiny models converted in this process by the real parts, right or with a fault in them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from hf_models import small
from layout_oracle import rows, stored_shapes

from shardconv.dtypes import dtype_of_code
from shardconv.families import find
from shardconv.family import Family, Layout, LayoutOptions, bind
from shardconv.formats.writing import NewTensor, write_checkpoint
from shardconv.layouts import LAYOUTS
from shardconv.plan import Plan, PlanOptions, make_plan
from shardconv.run.finish import custom_metadata
from shardconv.run.job import Job, Place
from shardconv.run.work import Workspace, array_spec, do_unit
from shardconv.sharding import MeshRules
from shardconv.sinks.commit import CommitRequest
from shardconv.sinks.orbax_commit import commit
from shardconv.sinks.paths import create_stage
from shardconv.sinks.spec import StoreOptions
from shardconv.source import Source, open_source
from shardconv.verify.request import Request
from shardconv.verify.second import Choices
from shardconv.verify.verdict import Verdict
from shardconv.verify.weights import check

CHOICES = Choices("flat", True, "source", "", "half", 0)
CHUNK = 2048  # bytes: most leaves of a tiny model are in several chunks


def make_model(directory: Path, name: str, code: str = "BF16", **changes: object) -> dict[str, np.ndarray]:
    """A checkpoint of random weights of a small version of a published config, in several files; its tensors."""
    config = small(name, **changes)
    tied = config.get("tie_word_embeddings", config["model_type"] == "gemma2")
    random = np.random.default_rng(5)
    shapes = stored_shapes(rows("flat", config, "half"), config, tied)
    tensors = {key: random.standard_normal(shape, np.float32).astype(dtype_of_code(code).numpy) for key, shape in shapes.items()}
    save_model(directory, config, tensors)
    return tensors


def save_model(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """A checkpoint of these tensors."""
    codes = {"bfloat16": "BF16", "float32": "F32", "float16": "F16", "float8_e4m3fn": "F8_E4M3"}
    new = [NewTensor(key, codes[array.dtype.name], array.shape) for key, array in tensors.items()]
    directory.mkdir(parents=True, exist_ok=True)
    write_checkpoint(directory, new, lambda tensor: [tensors[tensor.name].tobytes()], max_file_bytes=8_000, metadata={})
    (directory / "config.json").write_text(json.dumps(config))


def plan_of(
    source: Path,
    choices: Choices,
    *,
    layout: Callable[[Layout], Layout] = lambda table: table,
    family: Callable[[Family], Family] = lambda table: table,
    reading: Callable[[Source], Source] = lambda source: source,
    chunk: int = CHUNK,
    mesh: MeshRules = MeshRules({}, {}),  # noqa: B008  frozen
) -> Plan:
    """The plan of a conversion, with what a fault makes of the layout's or the family's table, or of what the source says."""
    opened = reading(open_source(source))
    model = bind(family(find(opened.config or {})), opened.config or {})
    table = LAYOUTS[choices.layout](model, LayoutOptions(choices.scan_layers, choices.rope, choices.vocab_size, choices.query_dtype))
    return make_plan(opened, model, layout(table), PlanOptions(choices.dtype, mesh, chunk, 64 << 20))


def write(plan: Plan, out: Path, store: StoreOptions | None = None, believed: Plan | None = None) -> Path:
    """Carry out a plan and commit it; the checkpoint. Its metadata is of plan `believed`, if that is another."""
    options = store or StoreOptions()
    stage = create_stage(str(out), None, None)
    done = [do_unit(plan, unit, stage, f"u{unit.number}", options, lambda _: None, Workspace()) for unit in plan.units]
    job = Job(Place(str(out), None, None, False), options, {})
    metadata = custom_metadata(believed or plan, job, [{"digests": one.digests} for one in done])
    attempts = tuple(one.attempt for one in done)
    commit(CommitRequest(str(out), None, None, tuple(array_spec(leaf) for leaf in plan.leaves), attempts, options, metadata))
    return out


def checked(plan: Plan, folder: Path, choices: Choices, *, workers: int = 1, sample: int | None = None, memory: int = 64 << 20) -> Verdict:
    """The check's verdict on a checkpoint, in this process."""
    return check(Request(str(folder), plan, choices, workers, memory, sample, seed=0))


def change(folder: Path, name: str, edit: Callable[[np.ndarray], None]) -> None:
    """Read an array of a checkpoint, let `edit` change it, and write it back, as something might after the conversion."""
    spec = {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": f"file://{folder}/", "path": f"{name}/"}}
    array = ts.open(spec, open=True).result()
    data = np.array(array.read().result())
    edit(data)
    array.write(data).result()


def renamed(table: Layout, **changes: Mapping[str, object]) -> Layout:
    """A layout's table with some slots changed, by parameter: `renamed(table, **{"layers.attn.q": {"dims": ...}})`."""
    return replace(table, slots=tuple(replace(slot, **changes.get(slot.param, {})) for slot in table.slots))  # type: ignore[arg-type]


def exchanged(table: Layout, a: str, b: str) -> Layout:
    """A layout's table with two parameters in each other's places."""
    other = {a: b, b: a}
    return replace(table, slots=tuple(replace(slot, param=other.get(slot.param, slot.param)) for slot in table.slots))
