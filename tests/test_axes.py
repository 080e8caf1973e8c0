"""Addresses: the notation, the laws of keys and positions, and every message."""

import itertools
import math
import re

import pytest
from algebra_oracle import World, laws, length, position, worlds
from hypothesis import given
from hypothesis import strategies as st

from shardconv.axes import Address, Digit, Hole, address, decode, encode, groups

AXES = {
    "layers": 4,
    "dense": 3,
    "experts": 8,
    "embed": 16,
    "mlp": 12,
    "vocab": 10,
    "heads": 6,
    "kv_heads": 2,
    "head_dim": "half pair",
    "half": 2,
    "pair": 4,
    "blocks": 3,
    "kind": ("local", "global"),
    "proj": ("w1", "w10", "q|k", "(.*)"),
    "alias": "kind",
    "none": 0,
}


def exactly(message: str) -> str:
    """The pattern of a message, word for word."""
    return f"^{re.escape(message)}$"


# --- laws -------------------------------------------------------------------------------------------------------------------------


@laws()
@given(worlds())
def test_an_address_means_what_its_notation_says(world: World) -> None:
    for place in world.source, world.target:
        read, tensors = world.address(place), world.stored(place)
        assert read.shape == tuple(length(dim, world.lengths) for dim in place.dims)
        assert read.sizes == world.sizes
        for index in world.indices():
            assert read.key(index) == world.key(place, index)
            for dim, tree in zip(read.dims, place.dims, strict=True):
                assert encode(dim, index) == position(tree, index, world.lengths)
        assert [key for key, _ in read.keys()] == list(dict.fromkeys(key for key, _ in read.keys()))
        assert {key for key, _ in read.keys()} == tensors.keys()


@laws()
@given(worlds())
def test_a_key_spells_its_indices_and_nothing_else_does(world: World) -> None:
    read = world.address(world.source)
    keys = {world.key(world.source, index): {axis: index[axis] for axis in read.named} for index in world.indices()}
    assert dict(read.keys()) == keys
    for key, index in keys.items():
        assert read.match(key) == index
    key = world.dice.choice(sorted(keys))
    at = world.dice.randint(0, len(key))
    typed = world.dice.choice(["", "0", "1", "9", "13", "x", ".", "\n", "\N{ARABIC-INDIC DIGIT THREE}"])
    other = key[:at] + typed + key[at + world.dice.randint(0, 2) :]
    assert read.match(other) == keys.get(other)


digits = st.builds(
    lambda axis, size, before, after: Digit(axis, size, before + size + after, before),
    st.sampled_from("abcdefgh"),
    st.integers(1, 4),
    st.integers(0, 2),
    st.integers(0, 2),
)
dims = st.lists(digits, max_size=4, unique_by=lambda digit: digit.axis).map(tuple)


@laws()
@given(dims)
def test_a_position_decodes_to_the_one_index_that_encodes_to_it(dim: tuple[Digit, ...]) -> None:
    indices = [dict(zip([d.axis for d in dim], at, strict=True)) for at in itertools.product(*(range(d.size) for d in dim))]
    known = {encode(dim, index): index for index in indices}
    assert len(known) == len(indices)
    size = math.prod(d.radix for d in dim)
    for place in range(-size - 1, 2 * size + 2):
        assert decode(dim, place) == known.get(place)


# --- the notation -----------------------------------------------------------------------------------------------------------------


def digits_of(dims: str, part: int = 0) -> list[list[tuple[str, int, int, int]]]:
    read = address("w", dims, AXES, part)
    return [[(digit.axis, digit.size, digit.radix, digit.offset) for digit in dim] for dim in read.dims]


def test_an_axis_is_a_dim() -> None:
    assert digits_of("embed layers") == [[("embed", 16, 16, 0)], [("layers", 4, 4, 0)]]


def test_brackets_flatten_row_major_and_may_be_nested() -> None:
    flat = [[("heads", 6, 6, 0), ("half", 2, 2, 0), ("pair", 4, 4, 0)]]
    for dims in ("(heads half pair)", "(heads (half pair))", "((heads half) pair)", "(heads head_dim)", "( 1 heads  head_dim )"):
        assert digits_of(dims) == flat


def test_one_is_a_dim_without_digits() -> None:
    assert digits_of("1 embed ()") == [[], [("embed", 16, 16, 0)], []]
    assert address("w", "1 embed ()", AXES).shape == (1, 16, 1)


def test_a_scalar_has_no_dims() -> None:
    assert address("w", "", AXES).dims == ()
    assert address("w", "", AXES).shape == ()


@pytest.mark.parametrize(("part", "axis", "size", "offset"), [(0, "heads", 6, 0), (1, "kv_heads", 2, 6), (2, "kv_heads", 2, 8)])
def test_a_sum_is_one_dim_and_each_part_starts_where_the_last_one_ends(part: int, axis: str, size: int, offset: int) -> None:
    inner = [("half", 2, 2, 0), ("pair", 4, 4, 0)]
    assert digits_of("((heads | kv_heads | kv_heads) head_dim) embed", part) == [[(axis, size, 10, offset), *inner], [("embed", 16, 16, 0)]]
    assert digits_of("(heads head_dim|kv_heads head_dim|kv_heads head_dim)", part) == [[(axis, size, 10, offset), *inner]]
    assert digits_of("(heads head_dim | (kv_heads head_dim) | (kv_heads half pair))", part) == [[(axis, size, 10, offset), *inner]]


def test_a_number_in_a_sum_is_room() -> None:
    assert digits_of("(vocab | 6)") == [[("vocab", 10, 16, 0)]]
    assert digits_of("(2 | vocab | 4)", part=1) == [[("vocab", 10, 16, 2)]]
    assert digits_of("(heads head_dim | 16)") == [[("heads", 6, 8, 0), ("half", 2, 2, 0), ("pair", 4, 4, 0)]]


def test_every_sum_of_an_address_has_the_same_part() -> None:
    assert digits_of("(heads | kv_heads) (embed | mlp)", part=1) == [[("kv_heads", 2, 8, 6)], [("mlp", 12, 28, 16)]]


def test_a_hole_counts_from_its_offset() -> None:
    read = address("h.{layers+3}.w", "", AXES)
    assert [key for key, _ in read.keys()] == ["h.3.w", "h.4.w", "h.5.w", "h.6.w"]
    assert address("h.{layers + dense}.w", "", AXES) == read
    assert [read.match(key) for key in ("h.3.w", "h.2.w", "h.7.w", "h.03.w", "h.+3.w", "h.3.w\n")] == [{"layers": 0}] + 5 * [None]


def test_an_offset_may_be_zero() -> None:
    assert address("h.{layers+none}", "", AXES) == address("h.{layers}", "", AXES)


def test_a_hole_of_several_axes_is_one_number() -> None:
    read = address("model.layers.{blocks kind}.w", "embed", AXES)
    assert read.key({"blocks": 2, "kind": 1}) == "model.layers.5.w"
    assert read.match("model.layers.4.w") == {"blocks": 2, "kind": 0}
    assert read.match("model.layers.6.w") is None


def test_labels_are_spelled_and_matched_to_the_letter() -> None:
    read = address("a.{proj}.{layers}", "", AXES)
    assert [read.key({"proj": place, "layers": 1}) for place in range(4)] == ["a.w1.1", "a.w10.1", "a.q|k.1", "a.(.*).1"]
    assert read.match("a.w10.1") == {"proj": 1, "layers": 1}
    assert read.match("a.(.*).3") == {"proj": 3, "layers": 3}
    assert [read.match(key) for key in ("a.q.1", "a.k.1", "a.w.1", "a.0.1", "a.w1.x")] == 5 * [None]


def test_a_name_for_one_labelled_axis_is_spelled_with_its_labels() -> None:
    assert address("{alias}", "", AXES).key({"kind": 1}) == "global"


def test_an_empty_label_is_a_label() -> None:
    read = address("w{variant}.x", "", {"variant": ("",)})
    assert (read.key({"variant": 0}), read.match("w.x"), read.match("w0.x")) == ("w.x", {"variant": 0}, None)


def test_signs_of_regular_expressions_in_a_name_are_letters() -> None:
    read = address("a.b+(c)[{layers}]|$", "", AXES)
    assert read.match("a.b+(c)[2]|$") == {"layers": 2}
    assert read.match("axb+(c)[2]|$") is None


def test_a_number_of_thousands_of_figures_is_no_key() -> None:
    assert address("h.{layers}", "", AXES).match("h." + 5000 * "1") is None


def test_an_axis_of_length_nothing_has_no_tensors_and_no_elements() -> None:
    read = address("h.{none}.w", "embed", AXES)
    assert list(read.keys()) == []
    assert read.match("h.0.w") is None
    assert address("w", "(embed none)", AXES).shape == (0,)


@pytest.mark.parametrize(
    ("dims", "found"),
    [
        ("", []),
        ("  ", []),
        ("embed", ["embed"]),
        (" embed  mlp ", ["embed", "mlp"]),
        ("(heads head_dim) embed", ["(heads head_dim)", "embed"]),
        ("(a (b c)) d", ["(a (b c))", "d"]),
        ("(a)(b)c(d)", ["(a)", "(b)", "c", "(d)"]),
        ("a|b | (c|d)", ["a", "|", "b", "|", "(c|d)"]),
    ],
)
def test_groups(dims: str, found: list[str]) -> None:
    assert groups(dims) == found


@pytest.mark.parametrize("dims", ["(embed", "embed)", ")embed(", "((a) b", "a) (b"])
def test_brackets_must_match(dims: str) -> None:
    with pytest.raises(ValueError, match=exactly(f"the brackets of {dims!r} do not match")):
        groups(dims)


KNOWN = "alias, blocks, dense, embed, experts, half, head_dim, heads, kind, kv_heads, layers, mlp, none, pair, proj, vocab"


MANY = ": a number in a name has 18 digits at most"


@pytest.mark.parametrize(
    ("name", "dims", "part", "message"),
    [
        ("w", "width", 0, f"w [width]: axis 'width' has no size; known: {KNOWN}"),
        ("w", "4", 0, f"w [4]: axis '4' has no size; known: {KNOWN}"),
        ("w", "embed | 4", 0, f"w [embed | 4]: axis '|' has no size; known: {KNOWN}"),
        ("h.{width}", "", 0, f"h.{{width}} []: axis 'width' has no size; known: {KNOWN}"),
        ("h.{layers+width}", "", 0, f"h.{{layers+width}} []: axis 'width' has no size; known: {KNOWN}"),
        ("h.{layers+-1}", "", 0, f"h.{{layers+-1}} []: axis '-1' has no size; known: {KNOWN}"),
        ("h.{layers+}", "", 0, f"h.{{layers+}} []: axis '' has no size; known: {KNOWN}"),
        ("h.{}", "", 0, "h.{} []: {} names no axis"),
        ("h.{+3}", "", 0, "h.{+3} []: {+3} names no axis"),
        ("h.{layers+999999999999999999}", "", 0, "h.{layers+999999999999999999} []: {layers+999999999999999999}" + MANY),
        ("h.{kind+1}", "", 0, "h.{kind+1} []: {kind+1}: labels take no offset"),
        ("h.{layers", "embed", 0, "h.{layers [embed]: the braces do not match"),
        ("h.layers}", "embed", 0, "h.layers} [embed]: the braces do not match"),
        ("h.{{layers}}", "embed", 0, "h.{{layers}} [embed]: the braces do not match"),
        ("{layers}{experts}", "", 0, "{layers}{experts} []: two holes with nothing but digits between them can be read in two ways"),
        ("{layers}1{kind}", "", 0, "{layers}1{kind} []: two holes with nothing but digits between them can be read in two ways"),
        ("h.{layers}", "layers embed", 0, "h.{layers} [layers embed]: axis layers stands twice"),
        ("h.{layers}.{layers}", "", 0, "h.{layers}.{layers} []: axis layers stands twice"),
        ("w", "(pair head_dim) half embed", 0, "w [(pair head_dim) half embed]: axis half, pair stands twice"),
        ("w", "embed (heads", 0, "w [embed (heads]: the brackets of 'embed (heads' do not match"),
        ("w", "embed) heads", 0, "w [embed) heads]: the brackets of 'embed) heads' do not match"),
        ("w", "(embed | )", 0, "w [(embed | )]: (embed | ) has an empty term"),
        ("w", "(| embed)", 1, "w [(| embed)]: (| embed) has an empty term"),
        ("w", "(embed | | mlp)", 0, "w [(embed | | mlp)]: (embed | | mlp) has an empty term"),
        ("w", "((heads | vocab) half | mlp)", 0, "w [((heads | vocab) half | mlp)]: ((heads | vocab) half | mlp) has a sum in a sum"),
        ("w", "(embed | mlp)", 2, "w [(embed | mlp)]: (embed | mlp) has no axis at part 2"),
        ("w", "(embed | mlp)", -1, "w [(embed | mlp)]: (embed | mlp) has no axis at part -1"),
        ("w", "(embed | 4)", 1, "w [(embed | 4)]: (embed | 4) has no axis at part 1"),
        ("w", "embed", 1, "w [embed]: there is no sum to take part 1 of"),
    ],
)
def test_messages(name: str, dims: str, part: int, message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        address(name, dims, AXES, part)


@pytest.mark.parametrize(
    ("dims", "part", "fact"),
    [
        ("(heads pair | embed | 3)", 0, "part 0 starts at 0 of 43, and both must be multiples of 4"),
        ("(1 | heads pair | 3)", 1, "part 1 starts at 1 of 28, and both must be multiples of 4"),
        ("(heads none | 3)", 0, "part 0 starts at 0 of 3, and both must be multiples of 0"),
    ],
)
def test_a_part_of_several_axes_needs_whole_steps(dims: str, part: int, fact: str) -> None:
    with pytest.raises(ValueError, match=exactly(f"w [{dims}]: {dims}: {fact}")):
        address("w", dims, AXES, part)


def test_labels_must_differ() -> None:
    with pytest.raises(ValueError, match=exactly("{kind} [embed]: axis 'kind' has a label twice")):
        address("{kind}", "embed", {"kind": ("a", "b", "a"), "embed": 3})


def test_an_address_is_a_value() -> None:
    one, two = (address("h.{layers}.w", "(heads head_dim) embed", AXES) for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)
    assert one == Address("h.{}.w", (Hole(one.holes[0].dim),), one.dims)
