"""`shardconv init`: a complete, commented config from a checkpoint's own config.json.

Nothing but config.json is read, so it works before the weights have arrived. Every key is written with the sentence that `shardconv.config`
has for it. What is chosen, rather than a default, follows from the model: the family from its architecture, the order of rotary pairs from
the layout, and a mesh by size: as many devices as hold `PER_DEVICE` bytes of weights each, split over `embed` first (fsdp), and from 16
devices on over experts, or where there are none over heads, mlp and vocab. A mesh axis never splits what it does not divide.

For a model of the user's own the weights' headers are read too, and the mapping that is proposed is written beside the config.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from shardconv.config import PLACES, Config, section_toml
from shardconv.config_report import unknown_layout
from shardconv.config_sections import MeshSection, ModelSection, OutputSection, SourceSection, TargetSection
from shardconv.errors import ConfigError, InputError, Problem
from shardconv.families import find
from shardconv.family import LayoutOptions, Model, bind
from shardconv.formats.strict_json import read_object
from shardconv.layouts import LAYOUTS
from shardconv.porting.making import Asked, Proposed, proposed_elsewhere
from shardconv.source import open_source

# Bytes of bfloat16 weights for one device. Training keeps about eight times that in weights, gradients and optimizer state: 40 GB,
# which today's smallest training accelerators have. It is a starting point: the comment in the file says to set the real mesh.
PER_DEVICE = 5 * 10**9
# One host of a pod slice or one GPU node; a smaller mesh is what nobody trains on.
FEWEST_DEVICES = 8
# Splitting heads and mlp further than over one host's devices pays in communication.
MOST_TENSOR = 8
RELATIVE = "# Relative paths are relative to the directory the program is started in. Set [mesh] to the mesh you train on.\n"
# The axes of a layer that tensor parallelism splits.
TENSOR_AXES = ("heads", "kv_heads", "mlp")


def write_config(hf_dir: str, layout: str, output: str, force: bool) -> str:
    """Write a config for the checkpoint in `hf_dir` to `output` and return its text.

    Raises InputError when config.json cannot be read or no family fits it, ConfigError when `output` exists and not `force`, or cannot
    be written.
    """
    text = config_text(read_hf_config(hf_dir), hf_dir, layout, output)
    _require_free([output], force)
    _write(output, text)
    return text


def _require_free(paths: Sequence[str], force: bool) -> None:
    problems = [Problem(f"{path} exists", "choose another --output, or add --force") for path in paths if os.path.lexists(path)]
    if problems and not force:
        raise ConfigError("will not overwrite a config", problems)


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        remedy = "give --output a file in a directory that is there and can be written"
        raise ConfigError("cannot write the config", [Problem(f"{path}: {error.strerror}", remedy)]) from None


def write_own_config(path: str, layout: str, output: str, force: bool) -> tuple[str, Proposed]:
    """Write a config for the checkpoint at `path` and a model of the user's own to `output`, and a mapping beside it, whose path is given.

    Raises InputError when the checkpoint cannot be read, ConfigError when there is no such model, or when a file exists and not `force`.
    """
    mapping = str(Path(output).with_suffix(".mapping.toml"))
    _require_free([output, mapping], force)
    found = proposed_elsewhere(Asked(layout, open_source(path), None, ()))
    name = Path(os.path.abspath(path)).name
    config = Config(
        source=SourceSection(path=path),
        target=TargetSection(layout=layout, mapping=mapping),
        output=OutputSection(path=os.path.join("converted", name)),
    )
    heading = f"# {name} into {layout}, by {mapping}\n{RELATIVE}# `shardconv plan {output}` shows what this gives, and writes nothing.\n"
    _write(output, f"{heading}\n{_body(config)}")
    _write(mapping, found.text)
    return mapping, found


def read_hf_config(hf_dir: str) -> Mapping[str, object]:
    """The config.json in a directory; raises InputError."""
    path = os.path.join(hf_dir, "config.json")
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        remedy = "give the directory that holds the model's config.json"
        raise InputError("cannot read the model's config", [Problem(f"{path}: {error.strerror}", remedy)]) from None
    return read_object(raw, what=path, at=0)


def config_text(hf_config: Mapping[str, object], hf_dir: str, layout: str, output: str) -> str:
    """The TOML text of a commented config for a model; `output` is only named in a comment."""
    if layout not in LAYOUTS:
        raise ConfigError("cannot write a config", [unknown_layout("--layout", layout, tuple(LAYOUTS))])
    model = bind(find(hf_config), hf_config)
    # What the layout makes of "auto" is written out, because it must agree with the config of the code that loads the checkpoint.
    chosen = LAYOUTS[layout](model, LayoutOptions(scan_layers=True, rope="auto", vocab_size=0, query_dtype=""))
    name = Path(os.path.abspath(hf_dir)).name
    step, item = PLACES.get(layout, (None, None))
    config = Config(
        source=SourceSection(path=hf_dir),
        model=ModelSection(family=model.family.name),
        target=TargetSection.model_validate({"layout": layout, "rope": chosen.metadata.get("rope", "auto")}),
        mesh=mesh_for(model),
        output=OutputSection(path=os.path.join("converted", name), step=step, item=item),
    )
    return f"{_heading(name, model, output)}\n{_body(config)}"


def _body(config: Config) -> str:
    return "\n".join(section_toml(section, getattr(config, section), comments=True) for section in Config.model_fields)


def parameters(model: Model) -> int:
    """How many numbers the model has, by its family's table; a tied unembedding is not counted.

    It is config.json's word, so it is for comments and mesh sizes: the plan counts what the files have.
    """
    tied = model.says_tied
    counted = (param for param in model.params if not (tied and param.name == "unembed"))
    return sum(math.prod(param.address(model.axes).sizes.values()) for param in counted)


def mesh_for(model: Model) -> MeshSection:
    """A mesh that holds the model, and the rules by which it is split."""
    size = {axis: length for axis, length in model.axes.items() if isinstance(length, int)}
    devices = max(FEWEST_DEVICES, _power_of_two_above(2 * parameters(model) / PER_DEVICE))
    inner = min(MOST_TENSOR, devices // FEWEST_DEVICES)
    name, split = ("expert", ("experts",)) if "experts" in size else ("tensor", TENSOR_AXES)
    inner = min(inner, *(_power_of_two_in(size[axis]) for axis in split))
    if name == "tensor" and size["vocab"] % inner == 0:  # an odd vocabulary is no reason not to split the layers
        split = ("vocab", *split)
    fsdp = min(devices // inner, _power_of_two_in(size["embed"]))
    axes = {"fsdp": fsdp} | ({name: inner} if inner > 1 else {})
    rules = {"embed": ("fsdp",)} | (dict.fromkeys(split, (name,)) if inner > 1 else {})
    return MeshSection(axes=axes, rules=rules)


def _power_of_two_above(number: float) -> int:
    return 1 << max(0, math.ceil(math.log2(number)))


def _power_of_two_in(number: int) -> int:
    """The largest power of two that divides a number."""
    return number & -number


def _heading(name: str, model: Model, output: str) -> str:
    """The comment at the top: what the model is, how large, and what to do next."""
    architectures = model.config.get("architectures")
    said = ", ".join(map(str, architectures)) if isinstance(architectures, list) else ""
    count = parameters(model)
    axes = ", ".join(f"{axis} {length}" for axis, length in model.axes.items() if isinstance(length, int))
    return (
        f"# {name} ({said}): {count / 1e9:.1f} billion parameters, {2 * count / 1e9:.1f} GB in bfloat16\n"
        f"# {axes}\n"
        f"{RELATIVE}"
        f"# `shardconv plan {output}` shows what this gives, and writes nothing.\n"
    )
