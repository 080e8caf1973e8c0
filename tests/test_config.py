"""Configs: the five shipped ones load, overrides go where they say, and every mistake is told word for word."""

import json
import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest
from conversions import make_config, make_source
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from shardconv.config import Config, changes, load_config, section_toml
from shardconv.config_sections import TargetDType
from shardconv.dtypes import dtype_named
from shardconv.errors import ConfigError, ExitCode, InputError
from shardconv.formats.writing import NewTensor, write_checkpoint
from shardconv.planning import plan_from_config
from shardconv.toml import read_toml, toml_value

CONFIGS = Path(__file__).parent.parent / "configs"
SHIPPED = ("llama8b", "llama70b", "llama405b", "mistral7b", "qwen3_32b")
OWN = "dinov3_vits16"
LEAST = '[source]\npath = "in"\n[target]\nlayout = "flat"\n[output]\npath = "out"\n'


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to be in, so that messages name files as they were typed."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str, *overrides: str) -> Config:
    Path("c.toml").write_text(text)
    return load_config("c.toml", overrides)


def refused(text: str, *overrides: str) -> str:
    """The report about a config that is not valid, without its title."""
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    title, _, body = str(caught.value).partition("\n")
    count = len(caught.value.problems)
    assert title == f"the config is not valid ({count} problem{'s' if count > 1 else ''}):"
    assert caught.value.exit_code == ExitCode.USAGE
    return body


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_loads_and_says_every_key_with_its_sentence(name: str) -> None:
    path = CONFIGS / f"{name}.toml"
    config = load_config(str(path))
    assert config.target.layout == "maxtext"
    sections = "\n".join(section_toml(section, getattr(config, section), comments=True) for section in Config.model_fields)
    heading, _, body = path.read_text().partition("\n\n")
    assert body == sections
    assert all(line.startswith("# ") for line in heading.splitlines())


def test_the_config_in_the_readme_loads_and_says_all_that_is_needed(here: Path) -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", (CONFIGS.parent / "README.md").read_text(), flags=re.DOTALL)
    config = load(text)
    shipped = load_config(str(CONFIGS / "llama70b.toml"))
    assert config.target.layout == "maxtext"
    assert (config.source, config.mesh, config.output) == (shipped.source, shipped.mesh, shipped.output)


def test_the_config_for_a_model_of_your_own_is_complete_too() -> None:
    path = CONFIGS / f"{OWN}.toml"
    config = load_config(str(path))
    assert (config.target.layout, config.target.mapping) == ("examples.dinov3_nnx:make_model", "examples/dinov3_nnx.toml")
    sections = "\n".join(section_toml(section, getattr(config, section), comments=True) for section in Config.model_fields)
    assert path.read_text().partition("\n\n")[2] == sections


def test_there_are_no_other_configs() -> None:
    assert sorted(path.stem for path in CONFIGS.iterdir()) == sorted((*SHIPPED, OWN))


def test_the_mesh_keeps_its_order_and_rules_are_tuples(here: Path) -> None:
    mesh = '[mesh]\naxes = { tensor = 4, data = 2, fsdp = 8 }\nrules = { embed = "fsdp", mlp = ["data", "tensor"], vocab = "" }'
    config = load(LEAST + mesh)
    assert list(config.mesh.axes.items()) == [("tensor", 4), ("data", 2), ("fsdp", 8)]
    assert config.mesh.rules == {"embed": ("fsdp",), "mlp": ("data", "tensor"), "vocab": ()}


def test_defaults(here: Path) -> None:
    config = load(LEAST)
    assert tomllib.loads(config.to_toml()) == {
        "source": {"path": "in", "prefix": "auto"},
        "model": {"family": "auto", "ignore": []},
        "target": {
            "layout": "flat",
            "mapping": "auto",
            "scan_layers": True,
            "dtype": "source",
            "query_dtype": "same",
            "rope": "auto",
            "vocab_size": "source",
        },
        "mesh": {"axes": {}, "placement": "stream", "processes": 1, "platform": "auto", "rules": {}},
        "output": {
            "path": "out",
            "step": "none",
            "item": "none",
            "zarr": 3,
            "ocdbt": True,
            "compression": "none",
            "chunk_bytes": "64MiB",
        },
        "workers": {"executor": "ray", "address": "local", "count": 0, "memory_budget": "auto", "max_restarts": 3},
        "check": {
            "mode": "weights",
            "sample": "auto",
            "seed": 0,
            "forward": "auto",
            "lengths": [64, 96, 160],
            "prompts": "none",
            "max_abs": "auto",
            "mean_abs": "auto",
            "max_kl": "auto",
            "factor": 4.0,
            "trace": False,
            "memory": "auto",
        },
    }
    assert (config.output.step, config.output.item, config.target.vocab_size, config.target.query_dtype) == (None, None, None, None)
    assert config.output.chunk_bytes == 64 * 2**20


def test_the_layout_says_where_its_loader_looks(here: Path) -> None:
    text = LEAST.replace("flat", "maxtext")
    assert (load(text).output.step, load(text).output.item) == (0, "items")
    chosen = load(text, "output.step=none", "output.item=params").output
    assert (chosen.step, chosen.item) == (None, "params")


def test_sizes_become_bytes(here: Path) -> None:
    config = load(LEAST, "workers.memory_budget=500MB", 'output.chunk_bytes="1GiB"')
    assert (config.workers.memory_budget, config.output.chunk_bytes) == (500_000_000, 2**30)


def test_a_home_directory_is_expanded(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert load(LEAST, "source.path=~/in").source.path == "/home/me/in"


def test_a_config_is_frozen(here: Path) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load(LEAST).workers.count = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", get_args(TargetDType))
def test_target_dtypes_are_dtypes(name: str) -> None:
    assert dtype_named(name).name == name


# Overrides


def test_overrides_go_over_the_file_and_later_ones_over_earlier_ones(here: Path) -> None:
    config = load(
        LEAST + "[mesh]\naxes = { fsdp = 8, tensor = 4 }",
        "source.path=/data/2026-11-21",
        "target.scan_layers=false",
        "mesh.axes.fsdp=16",
        "mesh.axes.data=2",
        'mesh.rules={ embed = ["fsdp", "data"] }',
        "mesh.rules.mlp=tensor",
        "workers.count=3",
        "workers.count=4",
        'output.path="a=b"',
    )
    assert config.source.path == "/data/2026-11-21"
    assert config.target.scan_layers is False
    assert list(config.mesh.axes.items()) == [("fsdp", 16), ("tensor", 4), ("data", 2)]
    assert config.mesh.rules == {"embed": ("fsdp", "data"), "mlp": ("tensor",)}
    assert config.workers.count == 4
    assert config.output.path == "a=b"


@pytest.mark.parametrize("value", ["2026-11-21", "07:32:00", "a b", "'", '"x" # comment\nsource = "y"', "nan-1"])
def test_what_is_not_a_toml_value_is_a_string(here: Path, value: str) -> None:
    assert load(LEAST, f"source.path={value}").source.path == value


def test_an_empty_override_is_an_empty_string(here: Path) -> None:
    assert refused(LEAST, "source.path=") == '  --set source.path=: [source] path = "" (a string), expected a path, in quotes'


def test_an_override_is_named_as_the_origin_of_its_mistake(here: Path) -> None:
    overrides = ("target.scan_layer=true", "targe.dtype=x", "workers.count=-1", "source=3", "nothing", "=1", "output.path.x=1")
    assert refused(LEAST, *overrides) == (
        "  --set nothing: no key and value\n"
        "      write --set section.key=value\n"
        "  --set =1: no key and value\n"
        "      write --set section.key=value\n"
        "  --set output.path.x=1: output.path is not a table\n"
        "      write --set section.key=value\n"
        "  --set source=3: source = 3 (an integer), expected the section [source]\n"
        '  --set target.scan_layer=true: [target] has no key "scan_layer"\n'
        '      did you mean "scan_layers"?\n'
        "  --set workers.count=-1: [workers] count = -1 (an integer), expected a whole number, 0 or more\n"
        "  --set targe.dtype=x: no section is called [targe]\n"
        "      did you mean [target]?"
    )


# Mistakes in the file


def test_all_mistakes_come_in_one_report(here: Path) -> None:
    text = """
        title = "mine"
        path = "in"
        [source]
        pth = 3
        [model]
        family = "lama"
        [target]
        layout = "maxtxt"
        scan_layer = true
        scan_layers = "yes"
        dtype = "bf16"
        vocab_size = 0
        item = "x"
        zzz = 1
        [output]
        path = ""
        step = -1
        item = "a/b"
        chunk_bytes = "64 megs"
        zarr = 1
        compression = true
        [workers]
        count = 1.5
        memory_budget = "lots"
        address = 5
        [wrokers]
        count = 1
        [xyz]
        """
    assert refused(text) == (
        "  c.toml: [source] path is missing\n"
        "      path: A directory of .safetensors or .bin files, one such file, or an index; relative to where the program starts.\n"
        '  c.toml: [source] has no key "pth"\n'
        '      did you mean "path"?\n'
        '  c.toml: [target] scan_layers = "yes" (a string), expected true or false\n'
        '  c.toml: [target] dtype = "bf16" is not a dtype\n'
        '      did you mean "bfloat16"? the choices are "source", "float32", "bfloat16", "float16", '
        '"float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"\n'
        '  c.toml: [target] vocab_size = 0 (an integer), expected a number of rows, or "source"\n'
        '  c.toml: [target] has no key "scan_layer"\n'
        '      did you mean "scan_layers"?\n'
        '  c.toml: [target] has no key "item"\n'
        "      it belongs under [output]\n"
        '  c.toml: [target] has no key "zzz"\n'
        "      its keys are layout, mapping, scan_layers, dtype, query_dtype, rope, vocab_size\n"
        '  c.toml: [output] path = "" (a string), expected a path, in quotes\n'
        '  c.toml: [output] step = -1 (an integer), expected a whole number, 0 or more, or "none"\n'
        '  c.toml: [output] item = "a/b" (a string), expected a directory name, or "none"\n'
        "  c.toml: [output] zarr = 1 is not a zarr format\n"
        "      the choices are 3, 2\n"
        "  c.toml: [output] compression = true is not a compression\n"
        '      the choices are "none", "zstd"\n'
        '  c.toml: [output] chunk_bytes = "64 megs" (a string), expected a size, such as "64MiB" or "500MB"\n'
        '  c.toml: [workers] address = 5 (an integer), expected an address such as "10.0.0.2:6379", or "local"\n'
        "  c.toml: [workers] count = 1.5 (a float), expected a whole number, 0 or more\n"
        '  c.toml: [workers] memory_budget = "lots" (a string), expected a size, such as "2GiB" or "500MB", or "auto"\n'
        '  c.toml: "title" is in no section\n'
        "      the sections are [source], [model], [target], [mesh], [output], [workers], [check]\n"
        '  c.toml: "path" is in no section\n'
        "      put it under [source] or [output]\n"
        "  c.toml: no section is called [wrokers]\n"
        "      did you mean [workers]?\n"
        "  c.toml: no section is called [xyz]\n"
        "      they are [source], [model], [target], [mesh], [output], [workers], [check]\n"
        '  c.toml: [target] layout = "maxtxt" is not known\n'
        '      did you mean "maxtext"? there are flat, maxtext; a model of your own is "module:function"\n'
        '  c.toml: [model] family = "lama" is not known\n'
        '      did you mean "llama"? there are auto, gemma2, llama, mistral, mixtral, qwen2, qwen3, qwen3_moe'
    )


def test_a_model_of_your_own_is_a_module_and_a_function(here: Path) -> None:
    assert refused(LEAST, "target.layout=clipjax.make_model") == (
        '  --set target.layout=clipjax.make_model: [target] layout = "clipjax.make_model" is not known\n'
        '      did you mean "clipjax:make_model"? there are flat, maxtext; a model of your own is "module:function"'
    )
    assert refused(LEAST, "target.layout=mine") == (
        '  --set target.layout=mine: [target] layout = "mine" is not known\n'
        '      there are flat, maxtext; a model of your own is "module:function"'
    )


def test_an_empty_config_misses_keys_and_not_sections(here: Path) -> None:
    assert refused("") == (
        "  c.toml: [source] path is missing\n"
        "      path: A directory of .safetensors or .bin files, one such file, or an index; relative to where the program starts.\n"
        "  c.toml: [target] layout is missing\n"
        "      layout: Whose names and shapes to write: one that `shardconv layouts` lists, or your own model, \"module:make_model\".\n"
        "  c.toml: [output] path is missing\n"
        "      path: The checkpoint's directory; unfinished work is kept beside it, in PATH.shardconv/."
    )


def test_rules_that_name_no_mesh_axis(here: Path) -> None:
    text = LEAST + '[mesh]\naxes = { fsdp = 8, tensor = 4 }\nrules = { embed = "fdsp", mlp = ["tensor", "tensor"], heads = ["x", "fsdp"] }'
    assert refused(text) == (
        '  c.toml: [mesh] rules.embed = "fdsp": "fdsp" is not a mesh axis\n'
        '      did you mean "fsdp"? the mesh axes are fsdp, tensor\n'
        '  c.toml: [mesh] rules.mlp = ["tensor", "tensor"]: "tensor" twice\n'
        "      a mesh axis splits a dim once\n"
        '  c.toml: [mesh] rules.heads = ["x", "fsdp"]: "x" is not a mesh axis\n'
        "      the mesh axes are fsdp, tensor"
    )
    assert refused(LEAST, "mesh.rules.embed=fsdp") == (
        '  --set mesh.rules.embed=fsdp: [mesh] rules.embed = "fsdp": "fsdp" is not a mesh axis\n'
        "      there are none; add axes = { fsdp = 8 }"
    )


def test_mesh_values_of_the_wrong_kind(here: Path) -> None:
    assert refused(LEAST + "[mesh]\naxes = { fsdp = 0, tensor = 2.0, data = true }\nrules = { embed = 3, mlp = [1] }") == (
        "  c.toml: [mesh] axes.fsdp = 0 (an integer), expected devices per mesh axis, such as { fsdp = 8, tensor = 4 }\n"
        "  c.toml: [mesh] axes.tensor = 2.0 (a float), expected devices per mesh axis, such as { fsdp = 8, tensor = 4 }\n"
        "  c.toml: [mesh] axes.data = true (a boolean), expected devices per mesh axis, such as { fsdp = 8, tensor = 4 }\n"
        '  c.toml: [mesh] rules.embed = 3 (an integer), expected mesh axes, such as "fsdp", ["fsdp", "tensor"], or "" for none\n'
        '  c.toml: [mesh] rules.mlp = [1] (an array), expected mesh axes, such as "fsdp", ["fsdp", "tensor"], or "" for none'
    )


@pytest.mark.parametrize("mode", ["none", "weights", "logits", "all"])
def test_the_checks(here: Path, mode: str) -> None:
    assert load(LEAST, f"check.mode={mode}").check.mode == mode


def test_bounds_of_logits_are_numbers_or_measured(here: Path) -> None:
    check = load(LEAST, "check.max_abs=1", "check.mean_abs=1e-3", "check.factor=8", 'check.max_kl="auto"').check
    assert (check.max_abs, check.mean_abs, check.max_kl, check.factor) == (1.0, 0.001, None, 8.0)
    assert refused(LEAST, "check.factor=0") == "  --set check.factor=0: [check] factor = 0 (an integer), expected a number above 0"
    assert refused(LEAST, "check.max_kl=inf") == (
        '  --set check.max_kl=inf: [check] max_kl = inf (a float), expected a number above 0, or "auto"'
    )
    assert refused(LEAST, "check.max_abs=true") == (
        '  --set check.max_abs=true: [check] max_abs = true (a boolean), expected a number above 0, or "auto"'
    )


def test_lengths_of_sequences(here: Path) -> None:
    assert load(LEAST, "check.lengths=[64]").check.lengths == (64,)
    assert load(LEAST, "check.lengths=[]", "check.prompts=p.txt").check.prompts == "p.txt"
    assert refused(LEAST, "check.lengths=[1]") == (
        "  --set check.lengths=[1]: [check] lengths = [1] (an array), expected lengths in tokens, such as [64, 160]"
    )
    assert refused(LEAST, "check.lengths=[]") == (
        '  --set check.lengths=[]: [check] lengths = [] and prompts = "none": no sequences to compare\n'
        "      give lengths, such as [64, 160], or prompts"
    )


@pytest.mark.parametrize("sample", ['"auto"', '"all"', "1", "4096"])
def test_a_sample_is_a_number_or_a_word(here: Path, sample: str) -> None:
    assert load(LEAST, f"check.sample={sample}").check.sample in ("auto", "all", 1, 4096)


@pytest.mark.parametrize("sample", ["0", '"some"', "1.5"])
def test_no_sample(here: Path, sample: str) -> None:
    assert f'[check] sample = {sample} (' in refused(LEAST, f"check.sample={sample}")
    assert 'expected a number of boxes, "all" or "auto"' in refused(LEAST, f"check.sample={sample}")


def test_a_check_that_will_never_be(here: Path) -> None:
    assert refused(LEAST + '[check]\nmode = "nome"') == (
        '  c.toml: [check] mode = "nome" is not a check\n      did you mean "none"? the choices are "none", "weights", "logits", "all"'
    )


def test_a_path_that_no_system_has(here: Path) -> None:
    assert refused(LEAST, r'output.path="a\u0000b"') == (
        r'  --set output.path="a\u0000b": [output] path = "a\u0000b" (a string), expected a path, in quotes'
    )


@pytest.mark.parametrize(("source", "output"), [("a", "a"), ("a/b/c", "a"), ("a", "b/../a"), ("a/x.safetensors", "a")])
def test_an_output_that_holds_the_source(here: Path, source: str, output: str) -> None:
    text = f'[source]\npath = "{source}"\n[target]\nlayout = "flat"\n[output]\npath = "{output}"\n'
    assert refused(text) == f'  c.toml: [output] path = "{output}" holds the source, "{source}"\n      choose a directory that does not'


def test_an_output_inside_the_source_is_fine(here: Path) -> None:
    assert load(LEAST, "source.path=a", "output.path=a/orbax").output.path == "a/orbax"


# Files that are no TOML


def unread(path: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return str(caught.value)


def test_a_syntax_error_has_its_line_and_column(here: Path) -> None:
    Path("c.toml").write_text('[source]\npath = "in"\n[target]\nlayout: "flat"\n')
    assert unread("c.toml") == (
        "cannot read the config (1 problem):\n"
        "  c.toml: line 4, column 7: Expected '=' after a key in a key/value pair\n"
        '      the line is: layout: "flat"'
    )


def test_a_syntax_error_at_the_end(here: Path) -> None:
    Path("c.toml").write_text("[source]\npath =")
    assert unread("c.toml").startswith("cannot read the config (1 problem):\n  c.toml: Invalid value (at end of document)")


def test_a_config_that_is_not_there(here: Path) -> None:
    Path("llama70b.toml").write_text(LEAST)
    assert unread("llama7b.toml") == "cannot read the config (1 problem):\n  llama7b.toml: no such file\n      did you mean llama70b.toml?"
    assert unread("nowhere/x.toml") == (
        "cannot read the config (1 problem):\n  nowhere/x.toml: no such file\n      `shardconv init HF_DIR --layout LAYOUT` writes one"
    )


def test_a_mapping_that_is_not_there(here: Path) -> None:
    written = "`shardconv init DIR --layout module:make_model` and shardconv.propose_mapping write one"
    Path("cnn.toml").write_text(LEAST)
    Path("nop.toml").write_text("[mapping\n")
    Path("nope.toml.d").mkdir()
    for remedy in (written, "did you mean nones.toml?"):
        with pytest.raises(ConfigError) as caught:
            read_toml("nope.toml", "mapping")
        assert str(caught.value) == f"cannot read the mapping (1 problem):\n  nope.toml: no such file\n      {remedy}"
        Path("nones.toml").write_text('[mapping]\n"a" = "b"\n')


def test_a_config_that_is_a_directory_or_not_text(here: Path) -> None:
    assert unread(".") == "cannot read the config (1 problem):\n  .: Is a directory"
    Path("c.toml").write_bytes(b"[source]\npath = \"\xff\"\n")
    assert unread("c.toml") == "cannot read the config (1 problem):\n  c.toml: byte 17 is not UTF-8\n      save the file as UTF-8"


# Digest and text


def test_the_digest_is_of_what_changes_the_checkpoint(here: Path) -> None:
    text = LEAST + '[mesh]\naxes = { fsdp = 8, tensor = 4 }\nrules = { embed = "fsdp" }'
    digest = load(text).digest()
    same = ["source.path=elsewhere", "output.path=elsewhere", "workers.count=7", "workers.memory_budget=1GiB", "workers.executor=local"]
    assert {load(text, override).digest() for override in same} == {digest}
    other = [
        "model.family=llama",
        "target.layout=maxtext",
        "target.scan_layers=false",
        "target.dtype=float32",
        "target.query_dtype=float32",
        "target.rope=half",
        "target.vocab_size=1024",
        "mesh.axes={ tensor = 4, fsdp = 8 }",
        "mesh.axes.fsdp=16",
        "mesh.rules.embed=tensor",
        "output.step=1",
        "output.item=x",
        "output.zarr=2",
        "output.ocdbt=false",
        "output.compression=zstd",
        "output.chunk_bytes=1MiB",
    ]
    digests = [digest, *(load(text, override).digest() for override in other)]
    assert len(set(digests)) == len(other) + 1


def test_every_key_is_in_the_facts_or_left_out_on_purpose(here: Path) -> None:
    keys = {f"{name}.{key}" for name, field in Config.model_fields.items() for key in field.annotation.model_fields}
    left_out = {"source.path", "output.path", "mesh.platform"} | {key for key in keys if key.startswith(("workers.", "check."))}
    assert set(load(LEAST).facts()) == keys - left_out


def test_changes_in_words(here: Path) -> None:
    before = load(LEAST).facts()
    after = load(LEAST, "target.dtype=bfloat16", "mesh.axes={ fsdp = 8 }", "output.step=3").facts()
    assert changes(before, after) == (
        'target.dtype was "source", is "bfloat16"',
        'mesh.axes was [], is [["fsdp", 8]]',
        "output.step was null, is 3",
    )
    assert changes(before, before) == ()


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
sizes = st.integers(min_value=1, max_value=2**40)


@st.composite
def tables(draw: st.DrawFn) -> dict[str, dict[str, object]]:
    """The tables of a valid config."""
    axes = draw(st.dictionaries(names, st.integers(min_value=1, max_value=64), max_size=3))
    rule = st.lists(st.sampled_from(sorted(axes)), unique=True) if axes else st.just([])
    return {
        "source": {"path": draw(names.filter(lambda text: not text.startswith("~") and "\0" not in text))},
        "target": {
            "layout": draw(st.sampled_from(["flat", "maxtext"])),
            "scan_layers": draw(st.booleans()),
            "dtype": draw(st.sampled_from(["source", *get_args(TargetDType)])),
            "query_dtype": draw(st.sampled_from(["same", "float32"])),
            "vocab_size": draw(st.just("source") | sizes),
        },
        "mesh": {"axes": axes, "rules": draw(st.dictionaries(names, rule, max_size=3))},
        "output": {
            "path": "\x7f/out",
            "step": draw(st.just("none") | sizes),
            "item": draw(st.sampled_from(["none", "items", "state"])),
            "chunk_bytes": draw(sizes),
        },
        "workers": {"memory_budget": draw(st.just("auto") | sizes)},
        "check": {
            "mode": draw(st.sampled_from(["none", "weights", "logits", "all"])),
            "prompts": draw(st.sampled_from(["none", "prompts.txt"])),
            "max_abs": draw(st.just("auto") | st.floats(1e-12, 1e6)),
            "memory": draw(st.just("auto") | sizes),
        },
    }


@given(tables())
def test_a_config_is_read_back_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, data: dict[str, dict[str, object]]) -> None:
    path = tmp_path_factory.mktemp("config") / "c.toml"
    path.write_text("".join(f"{section} = {toml_value(keys)}\n" for section, keys in data.items()))
    config = load_config(str(path))
    path.write_text(config.to_toml())
    assert load_config(str(path)) == config


def test_ignored_names_reach_the_plan(tmp_path: Path) -> None:
    source = make_source(tmp_path)
    write_checkpoint(
        source, [NewTensor("vision.w", "F32", (2,))], lambda tensor: [bytes(tensor.nbytes)], max_file_bytes=100, metadata={}
    )
    (source / "model.safetensors").rename(source / "extra.safetensors")
    index = source / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"]["vision.w"] = "extra.safetensors"
    listed["metadata"]["total_size"] += 8
    index.write_text(json.dumps(listed))
    with pytest.raises(InputError, match=r"vision\.w"):
        plan_from_config(make_config(tmp_path, source))
    plan = plan_from_config(make_config(tmp_path, source, 'model.ignore=["vision.*"]'))
    assert [note for note in plan.notes if "vision" in note] == ["vision.* (1 tensor) ignored"]
