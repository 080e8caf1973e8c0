"""Moves and what they stand on: sizes from shapes, expressions of tensors, layers by name, what is filled, and what is said of mistakes."""

import ml_dtypes
import numpy as np
import pytest

from shardconv.porting import equinox, linen, nnx
from shardconv.porting.folding import computed, names, parsed
from shardconv.porting.landing import gaps, in_dtype, landed
from shardconv.porting.layers import layers_of
from shardconv.porting.mapping import Pair, place_of
from shardconv.porting.moves import Move, bound, read_move
from shardconv.porting.rules import Layer, choices
from shardconv.porting.sizes import solved

F32 = np.dtype(np.float32)


@pytest.mark.parametrize(
    ("sides", "known", "expected"),
    [
        ([("o i h w", (4, 3, 2, 1))], {}, {"o": 4, "i": 3, "h": 2, "w": 1}),
        ([("o (c h w)", (2, 100))], {"h": 5, "w": 5}, {"h": 5, "w": 5, "o": 2, "c": 4}),
        ([("((heads | kv | kv) head_dim)", (32,)), ("heads head_dim", (4, 4))], {}, {"heads": 4, "head_dim": 4, "kv": 2}),
        ([("(groups i) o", (4, 3)), ("(groups o) i", (6, 2))], {}, {"o": 3, "i": 2, "groups": 2}),
        ([("o 1 1", (3, 1, 1)), ("(vocab | 2)", (10,))], {}, {"o": 3, "vocab": 8}),
        ([("a b", (None, 4))], {}, {"b": 4}),
    ],
)
def test_sizes_follow_from_shapes(sides: list[tuple[str, tuple[int, ...]]], known: dict[str, int], expected: dict[str, int]) -> None:
    assert solved(sides, known) == expected


@pytest.mark.parametrize(
    ("sides", "known", "said"),
    [
        ([("o i", (4, 3, 2))], {}, "`o i` has 2 dims, the shape (4, 3, 2) has 3"),
        ([("o i", (4, 3)), ("i o", (4, 3))], {}, "`i` is not 4 with i = 3 in the shape (4, 3)"),
        ([("(c h w)", (100,))], {"h": 3, "w": 5}, "`(c h w)` is not 100 with h = 3, w = 5 in the shape (100)"),
        ([("1", (2,))], {}, "`1` is not 2 in the shape (2)"),
    ],
)
def test_what_contradicts_is_said(sides: list[tuple[str, tuple[int, ...]]], known: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        solved(sides, known)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fc.weight: o i", "'fc.weight: o i' has no `dims -> dims` after the colon"),
        ("fold(a)", "there is no fold(); there are block_diagonal, flip, masked, spectral_norm, sum, weight_norm"),
        ("sum(a)", "sum takes 2 tensors, not 1"),
        ("a b", "'a b' is neither a tensor's name nor a call such as sum(a, b)"),
        ("a: o -> o; c", "'c' is not a size such as c=512"),
    ],
)
def test_a_move_that_cannot_be_read_says_why(text: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_move("x", text)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    "text",
    ["w: o i -> i o", "sum(a, b): (h | h) -> h; part=1", "fc.weight: o (c h w) -> (h w c) o; c=4, h=5", "a", "0", "flip(sum(a, b))"],
)
def test_a_move_is_its_text(text: str) -> None:
    assert str(read_move("x", text)) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("other: o i -> i o", "other is not in the checkpoint"),
        ("w: o i -> o", "`o` has 1 dim, the shape (3, 4) has 2; w is (4, 3), x is (3, 4)"),
        ("w: o i -> o i", "`o` is not 4 with o = 3 in the shape (4, 3); w is (4, 3), x is (3, 4)"),
        ("w: o i -> i a", "axis a, o is on one side only: w: o i -> i a"),
        ("w: o (c h) -> (h c) o", "no shape says how long c, h is: add `; c=..., h=...`; w is (4, 3), x is (3, 4)"),
    ],
)
def test_a_move_that_does_not_fit_says_why(text: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        bound(read_move("x", text), {"w": (4, 3)}, {"x": (3, 4)})
    assert str(caught.value) == said


def test_layers_in_names_are_stacked_and_taken_apart() -> None:
    tensors = {f"h.{i}.w": np.arange(6, dtype=np.float32).reshape(2, 3) + 10 * i for i in range(3)}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    stacked = bound(read_move("w", "h.{layers}.w: o i -> layers i o"), shapes, {"w": (3, 3, 2)})
    found = landed([stacked], tensors, {"w": F32})["w"]
    assert np.array_equal(found, np.stack([tensors[f"h.{i}.w"].T for i in range(3)]))
    apart = bound(read_move("l{layers}", "w: layers i o -> o i"), {"w": (3, 3, 2)}, {f"l{i}": (2, 3) for i in range(3)})
    back = landed([apart], {"w": found}, {f"l{i}": F32 for i in range(3)})
    assert all(np.array_equal(back[f"l{i}"], tensors[f"h.{i}.w"]) for i in range(3))


def test_moves_keep_every_bit() -> None:
    bits = np.array([[0x7FC0, 0xFFC1, 0x8000], [0x0001, 0x7F80, 0x3F80]], np.uint16)
    tensors = {"w": bits.view(ml_dtypes.bfloat16)}
    move = bound(read_move("x", "w: o i -> i o"), {"w": (2, 3)}, {"x": (3, 2)})
    found = landed([move], tensors, {"x": np.dtype(ml_dtypes.bfloat16)})["x"]
    assert np.array_equal(found.view(np.uint16), bits.T)


def test_another_dtype_rounds_once_and_whole_numbers_must_fit() -> None:
    assert in_dtype(np.float32([1 + 2**-9]), np.dtype(ml_dtypes.bfloat16)).tolist() == [1.0]
    assert in_dtype(np.int64([5]), np.dtype(np.int32)).tolist() == [5]
    with pytest.raises(ValueError, match="int64 does not fit int32"):
        in_dtype(np.int64([2**40]), np.dtype(np.int32))
    with pytest.raises(ValueError, match="float32 does not fit int32"):
        in_dtype(np.float32([0.5]), np.dtype(np.int32))


def test_what_is_not_filled_once_is_said() -> None:
    shapes = {"b": (6,), "c": (2,), "d": (6,)}

    def of(name: str, text: str) -> object:
        return bound(read_move(name, text), {"w": (6,), "v": (2,)}, shapes)

    moves = [of("b", "v: h -> (h | h | h); into=1"), of("d", "w"), of("d", "v: h -> (h | h | h)")]
    found = gaps(moves, shapes)  # type: ignore[arg-type]
    assert found == {
        "c": "nothing fills it",
        "d": "2 of its 6 elements are filled twice",
        "b": "4 of its 6 elements are not filled",
    }


def test_masks_keep_bits_and_must_have_been_loaded() -> None:
    bias, mask = np.float32([1.5, np.nan, -0.0]), np.float32([0.0, 1.0, 1.0])
    found = computed(parsed("masked(a, m)"), {"a": bias, "m": mask}, ())
    assert found.view(np.uint32).tolist() == [0, *bias[1:].view(np.uint32).tolist()]
    with pytest.raises(ValueError, match="the mask has other numbers than 0 and 1: it has not been loaded from the checkpoint"):
        computed(parsed("masked(a, m)"), {"a": bias, "m": np.full(3, np.nan, np.float32)}, ())


def test_layers_are_found_in_names() -> None:
    listed = "attn.in_proj_weight attn.out_proj.weight rnn.weight_ih_l1_reverse fc.weight_g fc.weight_v fc.bias cls".split()
    found = layers_of(listed, {"rnn": ("LSTM",)})
    assert list(found) == ["attn", "rnn.l1_reverse", "fc", ""]
    assert found["attn"][0].tensors["out_proj.weight"] == "attn.out_proj.weight"
    assert found["rnn.l1_reverse"][0].kinds == ("LSTM",)
    assert str(found["fc"][0].tensors["weight"]) == "weight_norm(fc.weight_g, fc.weight_v)"
    assert found["fc"][1].tensors["weight_v"] == "fc.weight_v"


def test_no_rule_fills_an_array_twice() -> None:
    """But for attention's, which has a row for each way in which torch keeps a projection."""
    for table in (linen.TABLE, nnx.TABLE, equinox.TABLE):
        for kind, rules in table.rules.items():
            for rule in rules:
                assert rule.rows, kind
                targets = [(row.target, row.into) for row in rule.rows]
                alternatives = [name for row in rule.rows for name in names(row.expression) if name.endswith("_proj_weight")]
                assert len(set(targets)) == len(targets) or alternatives, (table.library, kind)


def test_a_square_transposed_convolution_of_unknown_form_is_ambiguous() -> None:
    layer = Layer("up", {"weight": "up.weight"}, ("ConvTranspose2d",))
    found = choices(linen.TABLE, [layer], {"kernel": "up.kernel"}, {"up.weight": (4, 4, 3, 3)}, {"up.kernel": (3, 3, 4, 4)})
    assert [choice.name for choice in found] == ["ConvTranspose2d, transpose_kernel=True", "ConvTranspose2d, transpose_kernel=False"]


def test_of_what_no_class_is_known_the_usual_layer_is_meant() -> None:
    layer = Layer("c", {"weight": "c.weight"})
    found = choices(linen.TABLE, [layer], {"kernel": "c.kernel"}, {"c.weight": (4, 4, 3, 3)}, {"c.kernel": (3, 3, 4, 4)})
    assert [choice.kind for choice in found] == ["Conv2d"]


def test_sizes_of_a_move_may_be_given() -> None:
    move = bound(Move("w", "o (c h w)", "x", "(h w c) o", sizes={"c": 2, "h": 3}), {"w": (5, 12)}, {"x": (12, 5)})
    stored = np.arange(60, dtype=np.float32).reshape(5, 12)
    found = landed([move], {"w": stored}, {"x": F32})["x"]
    assert np.array_equal(found, stored.reshape(5, 2, 3, 2).transpose(2, 3, 1, 0).reshape(12, 5))


@pytest.mark.parametrize("order", [1, -1])
def test_the_longest_pair_that_fits_counts(order: int) -> None:
    pairs = [Pair("net", ""), Pair("stage{s}", "layer{s}"), Pair("stage{s}.norm{n}", "layer{s}.bn{n}"), Pair("last", "layer4")][::order]
    found = [place_of(pairs, layer) for layer in ("head", "layer1.conv", "layer1.bn2", "layer10", "layer4.conv")]
    assert [place and place[1] for place in found] == ["net.head", "stage1.conv", "stage1.norm2", "stage10", "last.conv"]
    assert place_of([pair for pair in pairs if pair.there], "layers1.conv") is None


# Expressions, against torch


def test_weight_norm_is_torchs_along_any_dim() -> None:
    torch = pytest.importorskip("torch")
    for dim in (0, 1, None):
        layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv2d(3, 4, (2, 3)), dim=dim)
        state = {name: np.asarray(value.detach().numpy() * 1.5) for name, value in layer.state_dict().items()}
        layer.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
        (views,) = layers_of(state, {}).values()
        found = computed(views[0].tensors["weight"], state, ())
        assert abs(found - layer.weight.detach().numpy()).max() < 1e-6


def test_spectral_norm_is_torchs_along_any_dim() -> None:
    torch = pytest.importorskip("torch")
    for kind in (torch.nn.Conv2d, torch.nn.ConvTranspose2d):
        layer = torch.nn.utils.parametrizations.spectral_norm(kind(3, 5, 2)).eval()
        state = {name: value.detach().numpy() for name, value in layer.state_dict().items()}
        (views,) = layers_of(state, {}).values()
        found = computed(views[0].tensors["weight"], state, ())
        assert abs(found - layer.weight.detach().numpy()).max() < 1e-6


def test_kernels_are_turned_in_space_alone() -> None:
    kernel = np.arange(24.0).reshape(1, 2, 3, 4)
    assert np.array_equal(computed(parsed("flip(k)"), {"k": kernel}, ()), kernel[:, :, ::-1, ::-1])


def test_groups_are_blocks_of_one_kernel() -> None:
    kernel = np.arange(1.0, 13.0).reshape(4, 3)  # two groups: two inputs and three outputs each
    found = computed(parsed("block_diagonal(k)"), {"k": kernel}, (4, 6))
    assert np.array_equal(found[:2, :3], kernel[:2]) and np.array_equal(found[2:, 3:], kernel[2:])
    assert not found[:2, 3:].any() and not found[2:, :3].any()
    with pytest.raises(ValueError, match="4 inputs and 5 outputs are no groups of 3 outputs"):
        computed(parsed("block_diagonal(k)"), {"k": kernel}, (4, 5))


def test_a_sum_is_rounded_once_and_is_of_equal_shapes() -> None:
    tensors = {"a": np.float32([1.0, 2.0]), "b": np.float32([2.0**-24, 3.0]), "c": np.float32([1.0])}
    assert computed(parsed("sum(a, b)"), tensors, ()).tolist() == [1.0, 5.0]
    with pytest.raises(ValueError, match=r"sum of \(2,\) and \(1,\)"):
        computed(parsed("sum(a, c)"), tensors, ())
