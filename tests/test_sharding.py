"""Mesh rules: PartitionSpecs as Flax gives them, axes that a layout has split, and shards that do not divide."""

import math

import pytest
from hf_models import CONFIGS
from hypothesis import given, settings
from hypothesis import strategies as st

from shardconv.axes import address
from shardconv.errors import Problem
from shardconv.families import find
from shardconv.family import LayoutOptions, bind
from shardconv.layouts import LAYOUTS
from shardconv.sharding import MeshRules, Misfit, misfits, partition, shards, yielded

AXES = {"layers": 4, "embed": 64, "heads": 8, "kv_heads": 2, "head_dim": 16, "mlp": 96, "vocab": 100, "experts": 8}
MESH = {"data": 2, "fsdp": 4, "tensor": 2, "expert": 8}


def flax_spec(names: list[str], rules: list[tuple[str, tuple[str, ...]]]) -> tuple:
    """`flax.linen.logical_to_mesh_axes`, by its documentation: rules in order of precedence; a rule takes its dim, if that is present and
    unused, for its mesh axes, if all of them are unused."""
    spec: list = [None] * len(names)
    for name, mesh_axes in rules:
        used = {axis for entry in spec if entry for axis in entry}
        if name in names and spec[names.index(name)] is None and not used & set(mesh_axes):
            spec[names.index(name)] = mesh_axes
    return tuple(entry[0] if entry and len(entry) == 1 else entry for entry in spec)


mesh_axes = st.lists(st.sampled_from(list(MESH)), min_size=1, max_size=3, unique=True).map(tuple)


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(list(AXES)), min_size=1, max_size=5, unique=True),
    st.lists(st.tuples(st.sampled_from(list(AXES)), mesh_axes), max_size=6, unique_by=lambda rule: rule[0]),
)
def test_specs_are_those_of_flax(names: list[str], rules: list[tuple[str, tuple[str, ...]]]) -> None:
    target = address("w", " ".join(names), AXES)
    assert partition(target, AXES, MeshRules(MESH, dict(rules))) == flax_spec(names, rules)


@pytest.mark.parametrize(
    ("dims", "rules", "spec"),
    [
        ("embed layers mlp", {"embed": ("fsdp",), "mlp": ("tensor",)}, ("fsdp", None, "tensor")),
        ("embed mlp", {"embed": ("fsdp",), "mlp": ("fsdp", "tensor")}, ("fsdp", None)),  # all of a rule or nothing
        ("embed mlp", {"mlp": ("fsdp", "tensor"), "embed": ("fsdp",)}, (None, ("fsdp", "tensor"))),  # the first rule wins
        ("heads kv_heads", {"kv_heads": ("tensor",), "heads": ("tensor",)}, (None, "tensor")),
        ("embed", {"embed": ()}, (None,)),
        ("embed", {"mlp": ("fsdp",)}, (None,)),
        ("embed", {}, (None,)),
        # a dim of several axes
        ("(heads head_dim) embed", {"head_dim": ("tensor",), "embed": ("fsdp",)}, ("tensor", "fsdp")),
        ("(heads head_dim) embed", {"head_dim": ("tensor",), "heads": ("fsdp",)}, ("tensor", None)),
        ("(vocab | 28) embed", {"vocab": ("fsdp",)}, ("fsdp", None)),
        ("embed 1", {"embed": ("fsdp",)}, ("fsdp", None)),
        ("", {"embed": ("fsdp",)}, ()),
    ],
)
def test_specs_by_hand(dims: str, rules: dict, spec: tuple) -> None:
    assert partition(address("w", dims, AXES), AXES, MeshRules(MESH, rules)) == spec


SPLIT = {**AXES, "head_dim": "half pair", "half": 2, "pair": 8, "layers": "blocks kind", "blocks": 2, "kind": ("local", "global")}


@pytest.mark.parametrize(
    ("name", "dims", "rules", "spec"),
    [
        ("q", "embed heads (pair half)", {"head_dim": ("tensor",)}, (None, None, "tensor")),
        ("q", "embed heads head_dim", {"head_dim": ("tensor",)}, (None, None, "tensor")),
        ("q", "embed heads (pair half)", {"pair": ("tensor",)}, (None, None, "tensor")),
        ("q.{kind}", "embed blocks heads", {"layers": ("data",)}, (None, "data", None)),
        ("q.{blocks}.{kind}", "embed heads", {"layers": ("data",)}, (None, None)),
        ("q", "half pair", {"head_dim": ("tensor",)}, ("tensor", None)),  # a mesh axis splits one dim
    ],
)
def test_an_axis_that_is_split_answers_to_the_whole(name: str, dims: str, rules: dict, spec: tuple) -> None:
    assert partition(address(name, dims, SPLIT), SPLIT, MeshRules(MESH, rules)) == spec


def test_an_axis_split_twice_answers_to_both() -> None:
    axes = {"layers": "stages rest", "stages": 2, "rest": "blocks kind", "blocks": 3, "kind": 2}
    for rule in ("layers", "rest", "blocks"):
        assert partition(address("w.{stages}", "blocks kind", axes), axes, MeshRules(MESH, {rule: ("data",)})) == ("data", None)


@pytest.mark.parametrize("rope", ["half", "interleaved"])
def test_a_rule_for_head_dim_holds_in_either_order_of_rope(rope: str) -> None:
    """The table that MaxText gets, with the rules that split every dim of it."""
    config = CONFIGS["llama3_8b"]
    model = bind(find(config), config)
    layout = LAYOUTS["maxtext"](model, LayoutOptions(True, rope, 0, ""))
    axes = {**model.axes, **layout.axes}
    mesh = MeshRules(MESH, {"layers": ("data",), "head_dim": ("tensor",), "embed": ("fsdp",)})
    specs = {slot.param: partition(address(slot.name, slot.dims, axes), axes, mesh) for slot in layout.slots}
    assert specs["layers.attn.q"] == specs["layers.attn.k"] == ("fsdp", "data", None, "tensor")
    assert specs["layers.attn.o"] == (None, "data", "tensor", "fsdp")
    assert specs["embed"] == (None, "fsdp")


def test_local_and_global_layers_are_split_as_layers() -> None:
    config = CONFIGS["gemma2_27b"]
    model = bind(find(config), config)
    layout = LAYOUTS["maxtext"](model, LayoutOptions(True, "half", 0, ""))
    axes = {**model.axes, **layout.axes}
    for slot in layout.slots:
        if slot.param.startswith("layers."):
            assert "data" in partition(address(slot.name, slot.dims, axes), axes, MeshRules(MESH, {"layers": ("data",)}))


def test_shards() -> None:
    mesh = MeshRules(MESH, {})
    assert shards(("fsdp", None, ("data", "tensor"), ()), mesh) == (4, 1, 4, 1)
    assert mesh.devices == math.prod(MESH.values())
    assert MeshRules({}, {}).devices == 1


def test_misfits_name_the_axis_the_numbers_and_the_rule() -> None:
    mesh = MeshRules(MESH, {"vocab": ("expert",), "head_dim": ("fsdp", "data", "tensor", "expert"), "embed": ("fsdp",)})
    (found,) = misfits(address("q", "vocab embed (pair half)", SPLIT), SPLIT, MeshRules(MESH, {**mesh.rules, "embed": ()}))
    assert found == Misfit("vocab", 100, ("expert",))
    assert found.problem({"q"}, mesh) == Problem(
        "vocab is 100 in q, which 8 shards along expert do not divide",
        'set mesh.axes.expert to a divisor of 100, or mesh.rules.vocab = "", or target.vocab_size = 104 to pad it',
    )
    (found,) = misfits(address("q", "(pair half)", SPLIT), SPLIT, mesh)
    assert found.problem({"q.0", "q.1"}, mesh) == Problem(
        "head_dim is 16 in 2 arrays, which 128 shards along fsdp and data and tensor and expert do not divide",
        "set mesh.axes.fsdp and mesh.axes.data and mesh.axes.tensor and mesh.axes.expert to numbers whose product divides 16, "
        'or mesh.rules.head_dim = ""',
    )
    assert misfits(address("w", "embed mlp", AXES), AXES, mesh) == []


@pytest.mark.parametrize(
    ("dims", "rules", "found"),
    [
        ("embed mlp", {"mlp": ("fsdp",), "embed": ("fsdp",)}, [("embed", "fsdp", "mlp")]),
        ("embed mlp", {"embed": ("fsdp",), "mlp": ("tensor", "fsdp")}, [("mlp", "fsdp", "embed")]),
        ("embed mlp", {"embed": ("fsdp",), "mlp": ("tensor",)}, []),
        ("embed", {"mlp": ("fsdp",), "embed": ("fsdp",)}, []),
        ("half pair", {"head_dim": ("tensor",)}, []),  # one rule, and two dims that answer to it
    ],
)
def test_rules_that_yield_to_an_earlier_one(dims: str, rules: dict, found: list) -> None:
    assert yielded(address("w", dims, SPLIT), SPLIT, MeshRules(MESH, rules)) == found
