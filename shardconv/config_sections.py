"""The sections of a config: every key, its type, its default and one sentence of what it is for. Nothing below this floor has a default.

They are frozen values: a word such as "none" has become None, "64MiB" has become bytes, and a mesh rule is a tuple of mesh axes.
"""

import math
import os.path
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from shardconv.budget import MIB, parse_size
from shardconv.config_report import Expected, Keys, Misfit
from shardconv.errors import Problem
from shardconv.toml import toml_key, toml_value
from shardconv.verify.logit_request import FACTOR, LENGTHS

# What a target leaf may be stored as; the names are NumPy's and ml_dtypes'.
TargetDType = Literal[
    "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"
]

# What to do about a key of [target] that is for other layouts.
UNFIT = {
    "mapping": 'leave it out: it is for a model of your own, layout = "module:make_model"',
    "query_dtype": "leave it out: your mapping folds no scale into the query",
    "rope": "leave it out: write the order of rotary dims into your mapping",
    "vocab_size": "leave it out: your model has its own number of rows",
}


@dataclass(frozen=True)
class Absent:
    """The word that stands for None in TOML, which has no null."""

    word: str


def _word(word: str) -> BeforeValidator:
    return BeforeValidator(lambda value: None if value == word else value)


def _size(value: object) -> object:
    return parse_size(value) if isinstance(value, str) and value != "auto" else value


def _mesh_axes(value: object) -> object:
    """A rule as a tuple of mesh axes: "" is none, a name is one."""
    if isinstance(value, str):
        return (value,) if value else ()
    return tuple(value) if isinstance(value, list) else value


def _float(value: object) -> object:
    """TOML has 4 where 4.0 is meant."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


Text = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, BeforeValidator(_float), Field(gt=0, allow_inf_nan=False)]
Place = Annotated[str, Field(pattern=r"^[^\x00]+$"), Expected("a path, in quotes"), AfterValidator(os.path.expanduser)]
# One directory name, and no dot in front: Orbax and the kernel keep those for themselves.
DirectoryName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
Flag = Annotated[bool, Expected("true or false")]
Rule = Annotated[tuple[Text, ...], BeforeValidator(_mesh_axes)]


class Section(BaseModel):
    """A table of the config: frozen, strict about types, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SourceSection(Section):
    """The checkpoint to convert."""

    path: Annotated[
        Place,
        Field(description="A directory of .safetensors or .bin files, one such file, or an index; relative to where the program starts."),
    ]
    prefix: Annotated[
        Text | None,
        Absent("auto"),
        _word("auto"),
        Expected("a key, in quotes"),
        Field(description='The key under which a PyTorch file has the tensors, such as "model"; "auto" finds the only one.'),
    ] = None


class ModelSection(Section):
    """What the checkpoint is."""

    family: Annotated[
        Text,
        Expected("a family's name, in quotes"),
        Field(description='A name that `shardconv families` lists; "auto" finds it by config.json.'),
    ] = "auto"
    ignore: Annotated[
        tuple[Text, ...],
        BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
        Expected('a list of names, such as ["vision.*"]'),
        Field(description='Tensors to leave out: names, with "*" for any text and "{}" for any number.'),
    ] = ()


class TargetSection(Section):
    """What the parameters become."""

    layout: Annotated[
        Text,
        Expected("a layout's name, in quotes"),
        Field(description='Whose names and shapes to write: one that `shardconv layouts` lists, or your own model, "module:make_model".'),
    ]
    mapping: Annotated[
        Place | None,
        Absent("auto"),
        _word("auto"),
        Expected('a TOML file, or "auto"'),
        Field(description='Of your own model: a file that says which tensor fills which array; "auto" proposes one and takes no chances.'),
    ] = None
    scan_layers: Annotated[
        Flag,
        Field(description="true: one array per parameter for all layers, as scanned code wants it; false: one per layer."),
    ] = True
    dtype: Annotated[
        Literal["source"] | TargetDType,
        Expected("a dtype", choices=("source", *get_args(TargetDType))),
        Field(description='What to store; "source" keeps each tensor\'s own dtype.'),
    ] = "source"
    query_dtype: Annotated[
        TargetDType | None,
        Absent("same"),
        _word("same"),
        Expected("a dtype", choices=("same", *get_args(TargetDType))),
        Field(description='dtype of query kernels that carry a folded scale, where rounding shows; "same" is as above.'),
    ] = None
    rope: Annotated[
        Literal["auto", "half", "interleaved"],
        Expected("an order", choices=("auto", "half", "interleaved")),
        Field(description='How the code that loads this pairs rotary dims: "half", "interleaved"; "auto" asks the layout.'),
    ] = "auto"
    vocab_size: Annotated[
        Positive | None,
        Absent("source"),
        _word("source"),
        Expected('a number of rows, or "source"'),
        Field(description='Rows of the embedding, padded with zeros up to here; "source" adds none.'),
    ] = None

    @model_validator(mode="after")
    def _fits_the_layout(self) -> Self:
        ours = {"query_dtype": self.query_dtype, "vocab_size": self.vocab_size, "rope": None if self.rope == "auto" else self.rope}
        wrong = ours if ":" in self.layout else {"mapping": self.mapping}
        told = f"does not go with layout = {toml_value(self.layout)}"
        problems = {key: f"[target] {key} = {toml_value(value)} {told}" for key, value in wrong.items() if value is not None}
        if problems:
            raise Misfit([((key,), Problem(fact, UNFIT[key])) for key, fact in problems.items()])
        return self


class MeshSection(Section):
    """The devices that will restore the checkpoint, or that it is written from; what is stored divides their shards."""

    axes: Annotated[
        Mapping[Text, Positive],
        Expected("devices per mesh axis, such as { fsdp = 8, tensor = 4 }"),
        Field(description="Mesh axes in order, with the number of devices along each."),
    ] = Field(default_factory=dict)
    placement: Annotated[
        Literal["stream", "mesh", "mesh-host", "mesh-device"],
        Expected("a placement", choices=("stream", "mesh", "mesh-host", "mesh-device")),
        Field(
            description='"stream": from file to file, no devices; "mesh": onto the mesh and written from there ("-host", "-device": how).'
        ),
    ] = "stream"
    processes: Annotated[
        Positive,
        Expected("a whole number, 1 or more"),
        Field(description="JAX processes that share the mesh where arrays are placed on it, one per host: each has as many devices."),
    ] = 1
    platform: Annotated[
        Literal["auto", "cpu", "gpu", "tpu"],
        Expected("a kind of devices", choices=("auto", "cpu", "gpu", "tpu")),
        Field(description='Whose devices these processes take: "cpu", "gpu" or "tpu"; "auto" takes accelerators where there are any.'),
    ] = "auto"
    rules: Annotated[
        Mapping[Text, Rule],
        Expected('mesh axes, such as "fsdp", ["fsdp", "tensor"], or "" for none'),
        Field(description='The mesh axes that split each named axis: one, a list, or "" for none.'),
    ] = Field(default_factory=dict)

    @property
    def places(self) -> bool:
        """Whether arrays are placed on the mesh and written from there."""
        return self.placement != "stream"

    @model_validator(mode="after")
    def _rules_fit_axes(self) -> Self:
        problems = self._placement_problems()
        problems += [problem for name, rule in self.rules.items() for problem in self._rule_problems(name, rule)]
        if problems:
            raise Misfit(problems)
        return self

    def _placement_problems(self) -> list[tuple[Keys, Problem]]:
        if not self.places:
            return []
        if not self.axes:
            fact = f"[mesh] placement = {toml_value(self.placement)}: the mesh has no axes"
            return [(("placement",), Problem(fact, "add axes = { fsdp = 8 }, with the number of devices along each"))]
        devices = math.prod(self.axes.values())
        if devices % self.processes:
            fact = f"[mesh] processes = {self.processes}: the mesh has {devices} devices, which they do not share evenly"
            return [(("processes",), Problem(fact, f"a divisor of {devices}"))]
        return []

    def _rule_problems(self, name: str, rule: tuple[str, ...]) -> list[tuple[Keys, Problem]]:
        said = f"[mesh] rules.{toml_key(name)} = {toml_value(rule_words(rule))}"
        known = f"the mesh axes are {', '.join(self.axes)}" if self.axes else "there are none; add axes = { fsdp = 8 }"
        problems = []
        for axis in dict.fromkeys(rule):
            if axis not in self.axes:
                close = get_close_matches(axis, self.axes, n=1)
                hint = f'did you mean "{close[0]}"? ' if close else ""
                problems.append(Problem(f'{said}: "{axis}" is not a mesh axis', hint + known))
            if rule.count(axis) > 1:
                problems.append(Problem(f'{said}: "{axis}" twice', "a mesh axis splits a dim once"))
        return [(("rules", name), problem) for problem in problems]


class OutputSection(Section):
    """Where the checkpoint goes and how it is stored."""

    path: Annotated[Place, Field(description="The checkpoint's directory; unfinished work is kept beside it, in PATH.shardconv/.")]
    step: Annotated[
        Natural | None,
        Absent("none"),
        _word("none"),
        Expected('a whole number, 0 or more, or "none"'),
        Field(description='Step directory in it, or "none"; left out, what the layout\'s loader looks for.'),
    ] = None
    item: Annotated[
        DirectoryName | None,
        Absent("none"),
        _word("none"),
        Expected('a directory name, or "none"'),
        Field(description='Item directory in that, or "none"; left out, what the layout\'s loader looks for.'),
    ] = None
    zarr: Annotated[
        Literal[3, 2],
        Expected("a zarr format", choices=(3, 2)),
        Field(description="3, or 2 for older readers."),
    ] = 3
    ocdbt: Annotated[
        Flag,
        Field(description="true: a few large files; false: a file per chunk."),
    ] = True
    compression: Annotated[
        Literal["none", "zstd"],
        Expected("a compression", choices=("none", "zstd")),
        Field(description='"none" is faster; "zstd" saves about a fifth of bfloat16 weights.'),
    ] = "none"
    chunk_bytes: Annotated[
        Positive,
        BeforeValidator(_size),
        Expected('a size, such as "64MiB" or "500MB"'),
        Field(description="The most that a reader has to fetch for one element."),
    ] = 64 * MIB


class WorkersSection(Section):
    """Who does the work; nothing here changes the checkpoint."""

    executor: Annotated[
        Literal["ray", "local"],
        Expected("an executor", choices=("ray", "local")),
        Field(description='"ray", or "local" for the same work without Ray.'),
    ] = "ray"
    address: Annotated[
        Text,
        Expected('an address such as "10.0.0.2:6379", or "local"'),
        Field(description='A Ray cluster; "local" starts one here. RAY_ADDRESS and --address go before it.'),
    ] = "local"
    count: Annotated[
        Natural,
        Expected("a whole number, 0 or more"),
        Field(description="How many; 0 is one per core."),
    ] = 0
    memory_budget: Annotated[
        Literal["auto"] | Positive,
        BeforeValidator(_size),
        Expected('a size, such as "2GiB" or "500MB", or "auto"'),
        Field(description='Memory for the buffers of each, such as "2GiB"; "auto" takes a share of what is free.'),
    ] = "auto"
    max_restarts: Annotated[
        Natural,
        Expected("a whole number, 0 or more"),
        Field(description="On a mesh: how often the processes are started again, all of them, after one of them died."),
    ] = 3


class CheckSection(Section):
    """What is compared after writing."""

    mode: Annotated[
        Literal["none", "weights", "logits", "all"],
        Expected("a check", choices=("none", "weights", "logits", "all")),
        Field(description='"weights": what is stored, with the source; "logits": what both models compute; "all": both; or "none".'),
    ] = "weights"
    sample: Annotated[
        Literal["auto", "all"] | Positive,
        Expected('a number of boxes, "all" or "auto"'),
        Field(description='Weights: boxes to look at in each array; "all" is every element, "auto" is that up to 16 GiB per worker.'),
    ] = "auto"
    seed: Annotated[
        Natural,
        Expected("a whole number, 0 or more"),
        Field(description="Chooses the boxes, and the token ids of random sequences."),
    ] = 0
    forward: Annotated[
        Text,
        Expected('"auto", "torch" or "module:function"'),
        Field(description='Logits: the JAX side; "auto" is ours, "torch" the PyTorch module traced, "module:function" your own.'),
    ] = "auto"
    lengths: Annotated[
        tuple[Annotated[int, Field(gt=1)], ...],
        BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
        Expected("lengths in tokens, such as [64, 160]"),
        Field(description="Logits: tokens of each random sequence; faults of position encodings do not show in less than 64."),
    ] = LENGTHS
    prompts: Annotated[
        Place | None,
        Absent("none"),
        _word("none"),
        Expected('a text file, or "none"'),
        Field(description='Logits: a text file whose lines are compared too, by the source\'s own tokenizer; or "none".'),
    ] = None
    max_abs: Annotated[
        PositiveFloat | None,
        Absent("auto"),
        _word("auto"),
        Expected('a number above 0, or "auto"'),
        Field(description='Logits: the largest difference that is allowed; "auto" is `factor` times the measured noise.'),
    ] = None
    mean_abs: Annotated[
        PositiveFloat | None,
        Absent("auto"),
        _word("auto"),
        Expected('a number above 0, or "auto"'),
        Field(description="Logits: the same of the mean difference."),
    ] = None
    max_kl: Annotated[
        PositiveFloat | None,
        Absent("auto"),
        _word("auto"),
        Expected('a number above 0, or "auto"'),
        Field(description='Logits: the same of the largest KL divergence in nats; "auto" is `factor` squared times the noise.'),
    ] = None
    factor: Annotated[
        PositiveFloat,
        Expected("a number above 0"),
        Field(description="Logits: how many times the measured noise the difference may be."),
    ] = FACTOR
    trace: Annotated[
        Flag,
        Field(description="Logits: if they differ, find the first part of the first block that does."),
    ] = False
    memory: Annotated[
        Literal["auto"] | Positive,
        BeforeValidator(_size),
        Expected('a size, such as "2GiB" or "500MB", or "auto"'),
        Field(description='Logits: arrays to hold at once; a larger checkpoint goes layer by layer; "auto" is half of what is free.'),
    ] = "auto"

    @model_validator(mode="after")
    def _there_is_a_sample(self) -> Self:
        if not self.lengths and self.prompts is None:
            fact = '[check] lengths = [] and prompts = "none": no sequences to compare'
            raise Misfit([(("lengths",), Problem(fact, "give lengths, such as [64, 160], or prompts"))])
        return self


def rule_words(rule: tuple[str, ...]) -> object:
    """A rule as a config file has it: one name, a list, or "" for none."""
    return rule[0] if len(rule) == 1 else list(rule) or ""
