"""Chunks: the limit is kept, grids cover, inner chunks divide what they must, and a chunk's source is whole rows."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shardconv.axes import address
from shardconv.boxes import chunk_box, grid_shape, slices
from shardconv.chunks import choose_chunk, cut_order
from shardconv.route import pieces
from shardconv.runs import byte_runs

# Under a loaded machine an example takes any time.
laws = settings(deadline=None)

sides = st.one_of(st.integers(1, 40), st.sampled_from([64, 97, 128, 360, 512, 1009, 4096]))


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int, int]:
    """A shape, the shards of each dim, an order of cutting, the size of an element and a limit."""
    shards = tuple(draw(st.lists(st.sampled_from([1, 1, 2, 3, 4, 8]), min_size=1, max_size=4)))
    shape = tuple(count * draw(sides) for count in shards)
    itemsize = draw(st.sampled_from([1, 2, 4]))
    limit = draw(st.integers(itemsize, 2 * math.prod(shape) * itemsize))
    return shape, shards, tuple(draw(st.permutations(range(len(shape))))), itemsize, limit


@laws
@given(cases())
def test_a_chunk_keeps_to_the_limit_and_inner_chunks_tile_it(case: tuple) -> None:
    shape, shards, order, itemsize, limit = case
    chunk, inner = choose_chunk(shape, itemsize=itemsize, limit=limit, shards=shards, order=order)
    assert math.prod(chunk) * itemsize <= limit
    assert all(1 <= c <= n and c % i == 0 for c, i, n in zip(chunk, inner, shape, strict=True))


@laws
@given(cases())
def test_chunks_cover_the_array_once(case: tuple) -> None:
    shape, shards, order, itemsize, limit = case
    chunk, _ = choose_chunk(shape, itemsize=itemsize, limit=limit, shards=shards, order=order)
    count = math.prod(grid_shape(shape, chunk))
    assume(math.prod(shape) <= 100_000 and count <= 300)
    found = np.zeros(shape, int)
    for number in range(count):
        found[slices(chunk_box(shape, chunk, number))] += 1
    assert (found == 1).all()


@laws
@given(cases())
def test_an_inner_chunk_lies_in_one_shard_or_the_shard_has_no_divisor_near(case: tuple) -> None:
    shape, shards, order, itemsize, limit = case
    chunk, inner = choose_chunk(shape, itemsize=itemsize, limit=limit, shards=shards, order=order)
    for size, count, side, fetched in zip(shape, shards, chunk, inner, strict=True):
        shard = size // count
        if count > 1 and shard % fetched:
            assert fetched == side
            fitting = [n for n in range(1, side + 1) if shard % n == 0 or (n % shard == 0 and size % n == 0)]
            assert 4 * max(fitting) < side


@laws
@given(cases())
def test_a_larger_limit_never_makes_a_smaller_chunk_of_a_regular_shape(case: tuple) -> None:
    shape, _, order, itemsize, limit = case
    shape = tuple(1 << (n.bit_length() - 1) for n in shape)
    whole = (1,) * len(shape)
    sizes = [
        math.prod(choose_chunk(shape, itemsize=itemsize, limit=most, shards=whole, order=order)[0]) * itemsize
        for most in (limit, 2 * limit)
    ]
    assert sizes[0] <= sizes[1]
    assert sizes[0] == math.prod(shape) * itemsize or 2 * sizes[0] > limit  # powers of two: never less than half of what may be


@pytest.mark.parametrize(
    ("shape", "limit", "shards", "order", "chunk", "inner"),
    [
        # one layer of a scanned kernel: layers are other tensors, so they are cut first; then rows of the source
        ((4096, 32, 14336), 64 << 20, (8, 1, 1), (1, 2, 0), (4096, 1, 7168), (512, 1, 7168)),
        ((14336, 32, 4096), 64 << 20, (4, 1, 8), (1, 2, 0), (14336, 1, 2048), (3584, 1, 512)),
        # several layers, where one is small
        ((4096, 32), 64 << 20, (8, 1), (1, 0), (4096, 32), (512, 32)),
        ((1024, 28, 1024), 8 << 20, (1, 1, 1), (1, 2, 0), (1024, 4, 1024), (1024, 4, 1024)),
        # several shards in one chunk
        ((128256, 4096), 64 << 20, (32, 1), (0, 1), (8016, 4096), (4008, 4096)),
        # a prime vocabulary: even pieces, the last one shorter
        ((50257, 768), 1 << 20, (1, 1), (0, 1), (680, 768), (680, 768)),
        # shards of a prime length: pieces of one row would keep to them, and are not worth it
        ((2 * 65537, 4096), 1 << 20, (2, 1), (0, 1), (128, 4096), (128, 4096)),
        ((), 2, (), (), (), ()),
    ],
)
def test_chunks_by_hand(shape: tuple, limit: int, shards: tuple, order: tuple, chunk: tuple, inner: tuple) -> None:
    assert choose_chunk(shape, itemsize=2, limit=limit, shards=shards, order=order) == (chunk, inner)


# --- the order of cutting ---------------------------------------------------------------------------------------------------------

AXES = {"layers": 3, "heads": 4, "head_dim": "half pair", "half": 2, "pair": 4, "embed": 16, "mlp": 24, "experts": 5, "vocab": 40}


@pytest.mark.parametrize(
    ("target", "source", "order"),
    [
        (("wi", "embed layers mlp"), ("{layers}.up", "mlp embed"), (1, 2, 0)),
        (("wo", "mlp layers embed"), ("{layers}.down", "embed mlp"), (1, 2, 0)),
        (("q", "embed layers heads head_dim"), ("{layers}.q", "(heads head_dim) embed"), (1, 2, 3, 0)),
        (("q", "embed layers heads (pair half)"), ("{layers}.q", "(heads head_dim) embed"), (1, 2, 3, 0)),
        (("wi", "experts layers embed mlp"), ("{layers}.{experts}.up", "mlp embed"), (1, 0, 3, 2)),
        (("embedding", "vocab embed"), ("embed", "vocab embed"), (0, 1)),
        (("norm", "embed 1"), ("norm", "embed"), (0, 1)),
    ],
)
def test_what_is_in_the_name_is_cut_first_and_then_the_slowest_dim(target: tuple, source: tuple, order: tuple) -> None:
    assert cut_order(address(*target, AXES), address(*source, AXES)) == order


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 24])
def test_a_chunk_needs_one_block_of_rows_of_each_tensor(rows: int) -> None:
    """However small the limit, down to one row of the source: each piece is one run of bytes, and no byte is read twice."""
    for target, source, row in (
        (address("wi", "embed layers mlp", AXES), address("{layers}.up", "mlp embed", AXES), 16),
        (address("wo", "mlp layers embed", AXES), address("{layers}.down", "embed mlp", AXES), 24),
        (address("q", "embed layers heads (pair half)", AXES), address("{layers}.q", "(heads head_dim) embed", AXES), 32),
        (address("ex", "experts layers embed mlp", AXES), address("{layers}.{experts}.up", "mlp embed", AXES), 16),
    ):
        shape, order = target.shape, cut_order(target, source)
        chunk, _ = choose_chunk(shape, itemsize=2, limit=2 * row * rows, shards=(1,) * len(shape), order=order)
        read = 0
        for number in range(math.prod(grid_shape(shape, chunk))):
            for piece in pieces(target, source, {}, chunk_box(shape, chunk, number)):
                runs = list(byte_runs(source.shape, piece.box, bits=16))
                assert len(runs) == 1
                read += runs[0][1]
        assert read == 2 * math.prod(shape)


def test_a_restore_in_shards_fetches_each_byte_once() -> None:
    """Counted on a real grid: the inner chunks that a shard touches hold the shard's elements and no others."""
    shape, shards = (64, 6, 48), (8, 1, 4)
    chunk, inner = choose_chunk(shape, itemsize=2, limit=4000, shards=shards, order=(1, 2, 0))
    assert chunk != shape
    fetched = np.zeros(shape, int)
    for shard in np.ndindex(*shards):
        box = [(i * n // count, (i + 1) * n // count) for i, n, count in zip(shard, shape, shards, strict=True)]
        touched = [(start // side * side, -(-stop // side) * side) for (start, stop), side in zip(box, inner, strict=True)]
        fetched[tuple(slice(*interval) for interval in touched)] += 1
    assert (fetched == 1).all()
