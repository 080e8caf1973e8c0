"""Push-down: the laws of pieces on random addresses, and real tensors against einops."""

import math
from collections.abc import Mapping
from random import Random

import numpy as np
import pytest
from algebra_oracle import World, laws, read, some_box, worlds
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st

from shardconv.axes import Address, Digit, address
from shardconv.boxes import Box, box_shape, chunk_box, grid_shape, whole
from shardconv.route import digit_boxes, pieces

Tensors = dict[str, np.ndarray]

# --- laws -------------------------------------------------------------------------------------------------------------------------


def part_of(tensor: np.ndarray, box: Box) -> np.ndarray:
    return tensor[(..., *(slice(*side) for side in box))]


@laws(1.5)
@given(worlds())
def test_any_box_of_any_address_comes_exactly(world: World) -> None:
    source, target = world.address(world.source), world.address(world.target)
    stored, wanted = world.stored(world.source), world.stored(world.target)
    key = world.dice.choice(sorted(wanted))
    box = some_box(world.dice, target.shape)
    got, count = read(target, source, stored, key, box, empty=-9)
    want = part_of(wanted[key], box)
    np.testing.assert_array_equal(got, np.where(want < 0, -9, want))  # nothing lands on room
    assert count == (want >= 0).sum()  # and nothing is read twice, or in vain


@laws(0.5)
@given(worlds())
def test_there_and_back_is_where_one_was(world: World) -> None:
    source, target = world.address(world.source), world.address(world.target)
    stored = world.stored(world.source)
    there = {key: read(target, source, stored, key, whole(target.shape))[0] for key, _ in target.keys()}
    for key, tensor in stored.items():
        back, _ = read(source, target, there, key, whole(source.shape))
        np.testing.assert_array_equal(back, tensor)


@laws(0.5)
@given(worlds())
def test_the_chunks_of_the_target_read_the_source_once(world: World) -> None:
    source, target = world.address(world.source), world.address(world.target)
    stored = world.stored(world.source)
    reads = {key: np.zeros(tensor.shape, int) for key, tensor in stored.items()}
    chunk = tuple(world.dice.randint(1, max(n, 1)) for n in target.shape)
    for _, index in target.keys():
        for number in range(math.prod(grid_shape(target.shape, chunk))):
            for piece in pieces(target, source, index, chunk_box(target.shape, chunk, number)):
                part_of(reads[piece.key], piece.box)[...] += 1
    for key, tensor in stored.items():
        np.testing.assert_array_equal(reads[key], tensor >= 0)


@laws(0.5)
@given(worlds())
def test_a_plain_piece_is_its_buffer(world: World) -> None:
    source, target = world.address(world.source), world.address(world.target)
    stored = world.stored(world.source)
    _, index = world.dice.choice(list(target.keys()))
    box = some_box(world.dice, target.shape)
    for piece in pieces(target, source, index, box):
        block = np.ascontiguousarray(part_of(stored[piece.key], piece.box))
        out = np.full(box_shape(box), -9)
        piece.land(block, out)
        assert piece.is_plain(out.shape) == (out.tobytes() == block.tobytes())


@laws(0.25)
@given(worlds(smallest=0))
def test_axes_of_length_nothing_have_nothing_to_move(world: World) -> None:
    source, target = world.address(world.source), world.address(world.target)
    moved = sum(read(target, source, world.stored(world.source), key, whole(target.shape))[1] for key, _ in target.keys())
    assert moved == math.prod(world.sizes.values())


digits = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), max_size=4).map(
    lambda sizes: tuple(Digit(f"a{place}", min(size), max(size)) for place, size in enumerate(sizes))
)


@laws()
@given(digits, st.randoms(use_true_random=True))
def test_digit_boxes_cover_a_range_in_order(dim: tuple[Digit, ...], dice: Random) -> None:
    radices = [digit.radix for digit in dim]
    ((start, stop),) = some_box(dice, (math.prod(radices),))
    cover = list(digit_boxes(dim, start, stop))
    places = np.arange(math.prod(radices)).reshape(radices)
    counted = [place for box in cover for place in part_of(places, box).ravel().tolist()]
    assert counted == list(range(start, stop))  # in order: each box is contiguous, and they follow one another
    assert len(cover) <= max(2 * len(dim) - 1, 1)


def test_an_empty_box_has_no_digit_boxes() -> None:
    assert list(digit_boxes((), 0, 0)) == []
    assert list(digit_boxes((Digit("a", 0, 0), Digit("b", 3, 3)), 0, 0)) == []
    assert list(digit_boxes((Digit("a", 3, 3), Digit("b", 0, 0)), 0, 0)) == []


# --- what a piece is --------------------------------------------------------------------------------------------------------------

AXES = {
    "layers": 4,
    "experts": 3,
    "embed": 6,
    "mlp": 10,
    "heads": 4,
    "kv_heads": 2,
    "groups": 2,
    "head_dim": "half pair",
    "half": 2,
    "pair": 3,
    "vocab": 11,
    "vocab_pad": 5,
    "dense": 3,
    "tp": 2,
    "rows": 5,
    "blocks": 2,
    "kind": ("local", "global"),
    "proj": ("w1", "w3"),
    "o": 4,
    "i": 3,
    "c": 3,
    "h": 2,
    "w": 5,
}


def test_whole_rows_are_one_piece() -> None:
    source = address("l.{layers}.q", "(heads head_dim) embed", AXES)
    target = address("q", "embed layers heads (pair half)", AXES)
    (piece,) = pieces(target, source, {}, ((0, 6), (2, 3), (0, 4), (0, 6)))
    assert (piece.key, piece.box, piece.digits) == ("l.2.q", ((0, 24), (0, 6)), (4, 2, 3, 6))


def test_axes_outside_a_partly_read_digit_are_walked() -> None:
    source, target = address("s", "(heads head_dim) embed", AXES), address("t", "head_dim heads embed", AXES)
    boxes = [piece.box for piece in pieces(target, source, {}, ((1, 3), (0, 3), (0, 6)))]
    assert boxes == [((6 * head + 1, 6 * head + 3), (0, 6)) for head in range(3)]


def test_room_has_no_pieces() -> None:
    source, target = address("s", "vocab embed", AXES), address("t", "(vocab | vocab_pad) embed", AXES)
    assert [piece.box for piece in pieces(target, source, {}, ((8, 16), (0, 6)))] == [((8, 11), (0, 6))]
    assert list(pieces(target, source, {}, ((11, 16), (0, 6)))) == []


def test_a_scalar_lands_in_a_scalar() -> None:
    for source, target, shape in (("", "", ()), ("1 1", "", ()), ("", "1", (1,)), ("()", "(1 1) 1", (1, 1))):
        (piece,) = pieces(address("t", target, {}), address("s", source, {}), {}, whole(shape))
        out = np.zeros(shape)
        piece.land(np.full(box_shape(piece.box), 5.0), out)
        np.testing.assert_array_equal(out, np.full(shape, 5.0))


# --- real tensors against einops --------------------------------------------------------------------------------------------------

HF = "model.layers.{layers}."
DENSE_FIRST = "model.layers.{layers+dense}."
# What it is; where it is kept; where it is wanted; and einops' word for it, after stacking the tensors in the order of their names.
CASES = {
    "a Linear's weight": (("fc.weight", "mlp embed"), ("fc.kernel", "embed mlp"), "1 m e -> 1 e m"),
    "q_proj scanned on axis 1": (
        (HF + "self_attn.q_proj.weight", "(heads head_dim) embed"),
        ("query.kernel", "embed layers heads head_dim"),
        "l (n d) e -> 1 e l n d",
    ),
    "q_proj in RoPE pairs": (
        (HF + "self_attn.q_proj.weight", "(heads head_dim) embed"),
        ("query.kernel", "embed layers heads (pair half)"),
        "l (n half pair) e -> 1 e l n (pair half)",
    ),
    "k_proj in RoPE pairs, a layer each": (
        (HF + "self_attn.k_proj.weight", "(kv_heads head_dim) embed"),
        ("layers_{layers}.key.kernel", "embed kv_heads (pair half)"),
        "l (k half pair) e -> l e k (pair half)",
    ),
    "q_proj's bias": ((HF + "q_proj.bias", "(heads head_dim)"), ("query.bias", "heads layers head_dim"), "l (n d) -> 1 n l d"),
    "q by groups of heads": (
        (HF + "self_attn.q_proj.weight", "(kv_heads groups head_dim) embed"),
        ("q", "layers embed (groups kv_heads) head_dim"),
        "l (k g d) e -> 1 l e (g k) d",
    ),
    "o_proj": (
        (HF + "self_attn.o_proj.weight", "embed (heads head_dim)"),
        ("out.kernel", "heads layers head_dim embed"),
        "l e (n d) -> 1 n l d e",
    ),
    "gate_proj": ((HF + "mlp.gate_proj.weight", "mlp embed"), ("wi_0.kernel", "embed layers mlp"), "l m e -> 1 e l m"),
    "down_proj unscanned": ((HF + "down_proj.weight", "embed mlp"), ("layers_{layers}.wo", "mlp embed"), "l e m -> l m e"),
    "a norm, scanned": ((HF + "input_layernorm.weight", "embed"), ("scale", "embed layers"), "l e -> 1 e l"),
    "experts stacked from tensors of their own": (
        (HF + "experts.{experts}.w1.weight", "mlp embed"),
        ("wi_0", "experts layers embed mlp"),
        "(l x) m e -> 1 x l e m",
    ),
    "experts after dense layers": (
        (DENSE_FIRST + "mlp.experts.{experts}.up_proj.weight", "mlp embed"),
        ("moe_layers.wi_1", "experts layers embed mlp"),
        "(l x) m e -> 1 x l e m",
    ),
    "labelled projections": (
        (HF + "experts.{experts}.{proj}.weight", "mlp embed"),
        ("wi.{layers}", "experts embed (mlp proj)"),
        "(l x p) m e -> l x e (m p)",
    ),
    "local and global layers that alternate": (
        ("model.layers.{blocks kind}.mlp.up_proj.weight", "mlp embed"),
        ("layers.mlp_{kind}.wi_1.kernel", "embed blocks mlp"),
        "(b k) m e -> k e b m",
    ),
    "local and global layers, unscanned": (
        ("model.layers.{blocks kind}.mlp.up_proj.weight", "mlp embed"),
        ("layers_{blocks}.mlp_{kind}.wi_1", "embed mlp"),
        "(b k) m e -> (b k) e m",
    ),
    "rows in a file each": (("consolidated.{tp}.wq", "rows embed"), ("wq", "embed (tp rows)"), "t r e -> 1 e (t r)"),
    "a convolution": (("conv.weight", "o i h w"), ("conv.kernel", "h w i o"), "1 o i h w -> 1 h w i o"),
    "the layer after a flatten": (("fc.weight", "o (c h w)"), ("fc.kernel", "(h w c) o"), "1 o (c h w) -> 1 (h w c) o"),
}
LENGTHS = {"n": 4, "k": 2, "g": 2, "half": 2, "x": 3, "p": 2, "t": 2, "h": 2, "w": 5, "c": 3, "b": 2}


def numbered(place: Address, start: int = 0) -> Tensors:
    """Its tensors, in the order of their names, with numbers from `start` counted through."""
    size = math.prod(place.shape)
    return {key: np.arange(start + n * size, start + (n + 1) * size).reshape(place.shape) for n, (key, _) in enumerate(place.keys())}


def converted(target: Address, source: Address, tensors: Mapping[str, np.ndarray]) -> Tensors:
    return {key: read(target, source, tensors, key, whole(target.shape))[0] for key, _ in target.keys()}


def same(got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        np.testing.assert_array_equal(got[key], tensor, err_msg=key)


@pytest.mark.parametrize("name", CASES)
def test_einops_says_the_same(name: str) -> None:
    (source_name, source_dims), (target_name, target_dims), pattern = CASES[name]
    source, target = address(source_name, source_dims, AXES), address(target_name, target_dims, AXES)
    tensors = numbered(source)
    lengths = {axis: size for axis, size in LENGTHS.items() if axis in pattern.replace("(", " ").replace(")", " ").split()}
    want = rearrange(np.stack(list(tensors.values())), pattern, **lengths)
    there = converted(target, source, tensors)
    same(there, dict(zip((key for key, _ in target.keys()), want, strict=True)))
    same(converted(source, target, there), tensors)


def test_a_fused_qkv_is_taken_apart_and_put_together() -> None:
    name, dims = "h.{layers}.qkv", "((heads | kv_heads | kv_heads) head_dim) embed"
    fused = [address(name, dims, AXES, part) for part in range(3)]
    apart = [
        address("q", "embed layers heads head_dim", AXES),
        address("k", "embed layers kv_heads head_dim", AXES),
        address("v", "embed layers kv_heads head_dim", AXES),
    ]
    tensors = numbered(fused[0])
    there: Tensors = {}
    for target, source, n in zip(apart, fused, (4, 2, 2), strict=True):
        there |= converted(target, source, tensors)
        assert there[target.name].shape == (6, 4, n, 6)
    for layer, tensor in enumerate(tensors.values()):
        for name, rows in zip("qkv", np.split(tensor, [24, 36]), strict=True):
            np.testing.assert_array_equal(there[name][:, layer], rearrange(rows, "(n d) e -> e n d", d=6))
    back = [converted(source, target, there) for target, source in zip(apart, fused, strict=True)]
    same({key: np.maximum.reduce([part[key] for part in back]) for key in tensors}, tensors)
    for part, (start, stop) in zip(back, ((0, 24), (24, 36), (36, 48)), strict=True):
        for tensor in part.values():  # each fills its own rows only
            assert (tensor[start:stop] >= 0).all()
            assert (np.delete(tensor, slice(start, stop), axis=0) == -1).all()


def test_a_fused_qkv_by_groups_interleaves_the_parts() -> None:
    axes = AXES | {"heads": "kv_heads groups", "one": 1}
    wanted = [
        address("q", "(heads head_dim) embed", axes),
        address("k", "(kv_heads one head_dim) embed", axes),
        address("v", "(kv_heads one head_dim) embed", axes),
    ]
    fused = [address("qkv", "(kv_heads (groups | one | one) head_dim) embed", axes, part) for part in range(3)]
    tensors = numbered(fused[0])
    by_group = rearrange(tensors["qkv"], "(k g d) e -> k g d e", k=2, d=6)
    for target, source, rows in zip(wanted, fused, (slice(0, 2), slice(2, 3), slice(3, 4)), strict=True):
        want = rearrange(by_group[:, rows], "k g d e -> (k g d) e")
        same(converted(target, source, tensors), {target.name: want})


def test_gate_and_up_side_by_side() -> None:
    gate, up = (address("l.{layers}.gate_up", "(mlp | mlp) embed", AXES, part) for part in range(2))
    tensors = numbered(gate)
    stacked = np.stack(list(tensors.values()))
    wanted = np.split(rearrange(stacked, "l m e -> e l m"), 2, axis=2)
    for source, want in zip((gate, up), wanted, strict=True):
        same(converted(address("wi", "embed layers mlp", AXES), source, tensors), {"wi": want})


def test_gate_and_up_become_one() -> None:
    stacked = []
    for part, name in enumerate(("gate", "up")):
        source = address("l.{layers}." + name, "mlp embed", AXES)
        tensors = numbered(source, start=1000 * part)
        stacked.append(rearrange(np.stack(list(tensors.values())), "l m e -> e l m"))
        got = converted(address("wi", "embed layers (mlp | mlp)", AXES, part), source, tensors)["wi"]
        np.testing.assert_array_equal(got[..., 10 * part : 10 * part + 10], stacked[part])
        assert (np.delete(got, slice(10 * part, 10 * part + 10), axis=2) == -1).all()


def test_the_vocabulary_is_padded_with_what_was_there() -> None:
    source, target = address("embed", "vocab embed", AXES), address("e", "embed (vocab | vocab_pad)", AXES)
    tensors = numbered(source)
    there = converted(target, source, tensors)
    same(there, {"e": np.pad(tensors["embed"].T, ((0, 0), (0, 5)), constant_values=-1)})
    same(converted(source, target, there), tensors)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
def test_tensors_that_are_tiled_arrive_whole(dtype: type) -> None:
    axes = AXES | {"embed": 700, "heads": 3, "pair": 40}
    source, target = address("{layers}", "(heads head_dim) embed", axes), address("q", "embed layers heads (pair half)", axes)
    tensors = {key: (tensor % 251).astype(dtype) for key, tensor in numbered(source).items()}
    got, _ = read(target, source, tensors, "q", whole(target.shape), empty=0)
    stack = np.stack(list(tensors.values()))
    np.testing.assert_array_equal(got, rearrange(stack, "l (n half pair) e -> e l n (pair half)", n=3, half=2))
