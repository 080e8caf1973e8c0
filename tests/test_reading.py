import ctypes
import mmap
import os
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stored import file_of, random_array, save

from shardconv.dtypes import DTYPES, dtype_of_code, raw_view
from shardconv.errors import ExitCode, InputError, RunError
from shardconv.formats import ComputedTensor, StoredTensor
from shardconv.formats.reading import ReadCounts, Reader, cost, rest
from shardconv.formats.safetensors import read_header

FILE = "m.safetensors"
READABLE = [d for d in DTYPES if d.readable]


def stored(path, arrays) -> dict[str, StoredTensor]:
    """The arrays' places in a file that now holds them."""
    save(path / FILE, arrays)
    return read_header(str(path), FILE).tensors


def read(reader, tensor, box) -> np.ndarray:
    out = np.empty([stop - start for start, stop in box], dtype_of_code(tensor.dtype).numpy)
    raw_view(out)[...] = 0x5A  # what is not read shows
    reader.read(tensor, box, out)
    return out


def part(array, box) -> bytes:
    return array[tuple(slice(*side) for side in box)].tobytes()


@pytest.fixture(scope="module")
def every_dtype(tmp_path_factory):
    """A file with a 4-D tensor, a vector and a scalar of each dtype of whole bytes, none of them aligned."""
    path = tmp_path_factory.mktemp("every")
    arrays = {"odd": random_array("U8", (3,), 0)}
    for i, dtype in enumerate(d for d in READABLE if d.bits >= 8):
        arrays[dtype.code] = random_array(dtype.code, (3, 4, 5, 6), i)
        arrays[dtype.code + ".scalar"] = random_array(dtype.code, (), i)
        arrays[dtype.code + ".none"] = random_array(dtype.code, (3, 0, 2), i)
    return path, arrays, stored(path, arrays)


@st.composite
def boxes(draw, shape=(3, 4, 5, 6)):
    starts = [draw(st.integers(0, n)) for n in shape]
    return tuple((start, draw(st.integers(start, n))) for start, n in zip(starts, shape, strict=True))


@given(st.sampled_from([d.code for d in READABLE if d.bits >= 8]), boxes(), st.integers(0, 400))
def test_any_box_of_any_dtype_is_numpys(every_dtype, code, box, gap):
    path, arrays, tensors = every_dtype
    with Reader(str(path), coalesce_gap=gap) as reader:
        assert read(reader, tensors[code], box).tobytes() == part(arrays[code], box)
        size = len(part(arrays[code], box))
        assert reader.counts.bytes_needed == size
        assert reader.counts.bytes_read >= size
        assert gap or reader.counts.bytes_read == size


def test_scalars_and_nothing(every_dtype):
    path, arrays, tensors = every_dtype
    with Reader(str(path), coalesce_gap=0) as reader:
        for dtype in READABLE:
            if dtype.bits < 8:
                continue
            assert (
                read(reader, tensors[dtype.code + ".scalar"], ()).tobytes() == arrays[dtype.code + ".scalar"].tobytes()
            )
            assert read(reader, tensors[dtype.code + ".none"], ((1, 3), (0, 0), (0, 2))).shape == (2, 0, 2)
        assert reader.counts.requests == sum(d.bits >= 8 for d in READABLE)


def test_what_torch_saved_is_read_bit_for_bit(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    raw = torch.from_numpy(np.random.default_rng(5).integers(0, 256, (8, 32), np.uint8))
    types = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BF16": torch.bfloat16, "F32": torch.float32}
    saved = {code: raw.view(kind) for code, kind in types.items()}
    save_file({name: t.clone() for name, t in saved.items()}, tmp_path / FILE)
    with Reader(str(tmp_path), coalesce_gap=64) as reader:
        for code, tensor in read_header(str(tmp_path), FILE).tensors.items():
            box = ((2, 7), (1, tensor.shape[1] - 2))
            theirs = saved[code][2:7, 1:-2].contiguous().view(torch.uint8).numpy()
            assert read(reader, tensor, box).tobytes() == theirs.tobytes()


def test_a_contiguous_box_is_one_request(tmp_path):
    array = random_array("BF16", (64, 1000), 1)
    tensor = stored(tmp_path, {"a": array})["a"]
    with Reader(str(tmp_path), coalesce_gap=0) as reader:
        read(reader, tensor, ((0, 64), (0, 1000)))
        assert reader.counts == ReadCounts(1, 128_000, 128_000)
        read(reader, tensor, ((10, 20), (0, 1000)))
        assert reader.counts == ReadCounts(2, 148_000, 148_000)
        read(reader, tensor, ((63, 64), (5, 6)))
        assert reader.counts == ReadCounts(3, 148_002, 148_002)


@pytest.mark.parametrize(
    ("gap", "expected"),
    [(0, ReadCounts(64, 6400, 6400)), (1899, ReadCounts(64, 6400, 6400)), (1900, ReadCounts(1, 126_100, 6400))],
)
def test_gaps_are_read_when_they_are_short_enough(tmp_path, gap, expected):
    # rows of 2000 bytes, of which 100 are wanted: 1900 lie between
    array = random_array("BF16", (64, 1000), 1)
    tensor = stored(tmp_path, {"a": array})["a"]
    with Reader(str(tmp_path), coalesce_gap=gap) as reader:
        box = ((0, 64), (7, 57))
        assert read(reader, tensor, box).tobytes() == part(array, box)
        assert reader.counts == expected


def test_more_runs_than_one_request_takes(tmp_path):
    array = random_array("U8", (1300, 3), 1)
    tensor = stored(tmp_path, {"a": array})["a"]
    with Reader(str(tmp_path), coalesce_gap=2) as reader:
        box = ((0, 1300), (1, 2))
        assert read(reader, tensor, box).tobytes() == part(array, box)
        # 512 runs a request: two gaps of two bytes between the three are not read
        assert reader.counts == ReadCounts(3, 1300 + 2 * (1299 - 2), 1300)


def f4_file(path, shape, seed) -> tuple[np.ndarray, StoredTensor]:
    """Elements, and a file that packs them, the even one in the low nibble."""
    elements = random_array("F4", shape, seed)
    flat = elements.view(np.uint8).reshape(-1)
    header = (
        b'{"odd":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"F4","shape":%b,"data_offsets":[1,%d]}}'
    )
    text = header % (str(list(shape)).encode(), 1 + flat.size // 2)
    (path / FILE).write_bytes(len(text).to_bytes(8, "little") + text + b"\0" + (flat[0::2] | flat[1::2] << 4).tobytes())
    return elements, read_header(str(path), FILE).tensors["a"]


@given(box=boxes((3, 4, 5)), gap=st.integers(0, 30))
def test_any_box_of_four_bit_elements(tmp_path_factory, box, gap):
    elements, tensor = f4_file(tmp_path_factory.getbasetemp(), (3, 4, 5), 1)
    with Reader(str(tmp_path_factory.getbasetemp()), coalesce_gap=gap) as reader:
        assert read(reader, tensor, box).tobytes() == part(elements, box)


def test_four_bit_elements_count_packed_bytes(tmp_path):
    elements, tensor = f4_file(tmp_path, (1000, 700), 2)
    with Reader(str(tmp_path), coalesce_gap=0) as reader:
        assert read(reader, tensor, ((0, 1000), (0, 700))).tobytes() == elements.tobytes()
        assert reader.counts == ReadCounts(1, 350_000, 350_000)
        assert read(reader, tensor, ((3, 5), (1, 4))).tobytes() == part(elements, ((3, 5), (1, 4)))
        assert reader.counts == ReadCounts(3, 350_004, 350_004)


def test_six_bit_elements_are_refused(tmp_path):
    header = b'{"a.w":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}'
    (tmp_path / FILE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    tensor = read_header(str(tmp_path), FILE).tensors["a.w"]
    with Reader(str(tmp_path), coalesce_gap=0) as reader, pytest.raises(InputError) as caught:
        read(reader, tensor, ((0, 4),))
    assert str(caught.value) == (
        "a.w cannot be read (1 problem):\n"
        "  m.safetensors: tensor a.w is F6_E2M3, whose packing safetensors does not define\n"
        "      store it as F8_E4M3, or packed as U8"
    )


def test_a_computed_tensor_is_made_of_all_of_its_inputs(tmp_path):
    kernel, bias = np.arange(24, dtype=np.float32).reshape(2, 3, 4), np.ones((2, 3, 4), np.float32)
    tensors = stored(tmp_path, {"kernel": kernel, "bias": bias, "other": bias})
    made = ComputedTensor("sum(flip(kernel), bias)", "F32", (2, 3, 4), (tensors["kernel"], tensors["bias"]))
    box = ((0, 2), (1, 3), (0, 2))
    with Reader(str(tmp_path), coalesce_gap=0) as reader:
        assert np.array_equal(read(reader, made, box), kernel[:, 1:3, ::-1][..., :2] + 1)
        assert (reader.counts.bytes_read, reader.counts.requests) == cost(made, box, 0) == (192, 2)


def test_inputs_that_do_not_fit_together_are_the_inputs_fault(tmp_path):
    tensors = stored(tmp_path, {"bias": np.ones(4, np.float32), "mask": np.full(4, 0.5, np.float32)})
    made = ComputedTensor("masked(bias, mask)", "F32", (4,), (tensors["bias"], tensors["mask"]))
    with Reader(str(tmp_path), coalesce_gap=0) as reader, pytest.raises(InputError) as caught:
        read(reader, made, ((0, 4),))
    assert str(caught.value) == (
        "masked(bias, mask) cannot be computed (1 problem):\n"
        "  the mask has other numbers than 0 and 1: it has not been loaded from the checkpoint"
    )


def test_out_must_fit(tmp_path):
    tensor = stored(tmp_path, {"a.w": random_array("F32", (4, 6), 1)})["a.w"]
    box = ((0, 4), (0, 3))
    wrong = {
        "out float32 (3, 4)": np.empty((3, 4), np.float32),
        "out float32 (12,)": np.empty(12, np.float32),
        "out uint32 (4, 3)": np.empty((4, 3), np.uint32),
        "out float32 (4, 3)": np.empty((3, 4), np.float32).T,
    }
    with Reader(str(tmp_path), coalesce_gap=0) as reader:
        for message, out in wrong.items():
            with pytest.raises(ValueError, match="is read as float32") as caught:
                reader.read(tensor, box, out)
            assert str(caught.value) == f"a.w is read as float32 (4, 3), {message}"
        assert reader.counts == ReadCounts(0, 0, 0)


def test_a_file_cut_short_after_planning(tmp_path):
    tensors = stored(tmp_path, {"a": random_array("F32", (100,), 1), "b.w": random_array("F32", (100, 100), 1)})
    tensor = tensors["b.w"]
    os.truncate(tmp_path / FILE, tensor.offset + 1000)
    size, end = tensor.offset + 1000, tensor.offset + 40_000
    with Reader(str(tmp_path), coalesce_gap=0) as reader:
        read(reader, tensors["a"], ((0, 100),))
        read(reader, tensor, ((0, 2), (0, 100)))
        for box in (((0, 100), (0, 100)), ((50, 60), (3, 4))):
            with pytest.raises(InputError) as caught:
                read(reader, tensor, box)
            assert str(caught.value) == (
                "m.safetensors cannot be read (1 problem):\n"
                f"  m.safetensors was cut short since it was planned: tensor b.w is at bytes {tensor.offset} to {end}, "
                f"but the file has {size} (39000 short)\n"
                "      download this file again"
            )


def test_a_file_gone_after_planning(tmp_path):
    tensor = stored(tmp_path, {"b.w": random_array("F32", (4,), 1)})["b.w"]
    (tmp_path / FILE).unlink()
    with Reader(str(tmp_path), coalesce_gap=0) as reader, pytest.raises(InputError) as caught:
        read(reader, tensor, ((0, 4),))
    assert str(caught.value) == (
        "m.safetensors cannot be read (1 problem):\n"
        "  m.safetensors holds tensor b.w and cannot be opened any more: No such file or directory\n"
        "      put it back, or plan again"
    )


def test_a_system_that_fails_to_read_is_no_fault_of_the_input(tmp_path):
    (tmp_path / "d").mkdir()  # it opens, and every read of it fails
    tensor = StoredTensor("b.w", "d", "F32", (4,), 8, 16)
    with Reader(str(tmp_path), coalesce_gap=0) as reader, pytest.raises(RunError) as caught:
        read(reader, tensor, ((0, 4),))
    assert caught.value.exit_code == ExitCode.RESUMABLE
    assert str(caught.value) == (
        "d cannot be read (1 problem):\n"
        "  d: reading bytes 8 to 24 for tensor b.w failed: Is a directory\n"
        "      run the same command again"
    )


@pytest.mark.parametrize("gap", [0, 2000])
def test_reading_goes_on_after_a_short_read(gap):
    # the kernel hands this file out a page at a time, however much is asked for
    with open("/proc/kallsyms", "rb") as file:
        content = file.read(400_000)
        if len(content) < 400_000 or len(os.pread(file.fileno(), 400_000, 0)) == 400_000:
            pytest.skip("no file here that reads short")
    table = np.frombuffer(content, np.uint8).reshape(10, 40_000)
    tensor = StoredTensor("symbols", "kallsyms", "U8", table.shape, 0, table.size)
    for box in (((0, 10), (0, 40_000)), ((1, 9), (700, 39_000))):
        with Reader("/proc", coalesce_gap=gap) as reader:
            assert read(reader, tensor, box).tobytes() == part(table, box)
            needed = len(part(table, box))
            gaps = 7 * 1700 if gap and box[0] == (1, 9) else 0
            assert reader.counts.requests > 50
            assert (reader.counts.bytes_read, reader.counts.bytes_needed) == (needed + gaps, needed)


@given(st.lists(st.binary(max_size=6), max_size=8), st.data())
def test_the_rest_of_some_buffers(blocks, data):
    together = b"".join(blocks)
    done = data.draw(st.integers(0, len(together)))
    found = list(rest([memoryview(block) for block in blocks], done))
    assert b"".join(found) == together[done:]
    assert all(len(block) for block in found)


def open_descriptors(path) -> int:
    links = (os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
    return sum(os.readlink(link).startswith(str(path)) for link in links if os.path.islink(link))


def test_few_files_stay_open_and_none_after_closing(tmp_path):
    content = file_of({"a": random_array("U8", (8,), 1)})
    tensors = []
    for i in range(40):
        (tmp_path / f"{i}.safetensors").write_bytes(content)
        tensors.append(read_header(str(tmp_path), f"{i}.safetensors").tensors["a"])
    reader = Reader(str(tmp_path), coalesce_gap=0)
    for tensor in tensors:
        read(reader, tensor, ((0, 8),))
    assert open_descriptors(tmp_path) == 16
    for i in (*range(16), 0, 16):  # the one that was used again stays open, the one before it is closed
        read(reader, tensors[i], ((0, 8),))
    assert open_descriptors(tmp_path) == 16
    (tmp_path / "0.safetensors").unlink()
    read(reader, tensors[0], ((0, 8),))
    reader.close()
    assert open_descriptors(tmp_path) == 0
    with pytest.raises(InputError):
        read(reader, tensors[0], ((0, 8),))
    with reader:
        read(reader, tensors[1], ((0, 8),))
    assert open_descriptors(tmp_path) == 0


def cached_pages(path) -> int:
    """The pages of a file that the page cache holds."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as view:
        pages = -(-len(view) // mmap.PAGESIZE)
        resident = (ctypes.c_ubyte * pages)()
        anchor = ctypes.c_char.from_buffer(view)
        assert libc.mincore(ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(len(view)), resident) == 0
        del anchor
        return sum(page & 1 for page in resident)


def forget(path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.fixture
def large(tmp_path):
    """A tensor of 24 MiB behind an odd header, on a file system whose cache can be dropped."""
    tensor = stored(tmp_path, {"a": random_array("U8", (24, 1024, 1024), 1)})["a"]
    forget(tmp_path / FILE)
    if cached_pages(tmp_path / FILE) > 0:
        pytest.skip("the cache of this file system cannot be dropped")
    return tmp_path, tensor


def test_what_was_read_leaves_the_page_cache(large):
    path, tensor = large
    with Reader(str(path), coalesce_gap=0) as reader:
        for i in range(23):
            read(reader, tensor, ((i, i + 1), (0, 1024), (0, 1024)))
        read(reader, tensor, ((23, 24), (0, 512), (0, 1024)))
        assert 7 << 8 <= cached_pages(path / FILE) <= 9 << 8  # under 8 MiB behind the reader, and the end of the file
    assert cached_pages(path / FILE) <= 3 << 8


def test_nobody_elses_pages_leave_the_page_cache(large):
    path, tensor = large
    (path / FILE).read_bytes()
    with Reader(str(path), coalesce_gap=0) as reader:
        read(reader, tensor, ((2, 3), (0, 1024), (0, 1024)))
        read(reader, tensor, ((20, 21), (0, 1024), (0, 1024)))
    assert 21 << 8 <= cached_pages(path / FILE) <= 23 << 8


def test_the_page_cache_is_kept_on_request(large):
    path, tensor = large
    with Reader(str(path), drop_cache=False, coalesce_gap=0) as reader:
        read(reader, tensor, ((0, 24), (0, 1024), (0, 1024)))
    assert cached_pages(path / FILE) >= 24 << 8


def test_pages_that_the_next_box_shares_are_kept(large):
    path, tensor = large
    with Reader(str(path), coalesce_gap=1024) as reader:
        read(reader, tensor, ((0, 24), (0, 1024), (0, 512)))
        read(reader, tensor, ((0, 24), (0, 1024), (512, 1000)))
    assert cached_pages(path / FILE) >= 24 << 8


def test_reading_takes_no_memory_of_its_own(tmp_path):
    array = random_array("U8", (40_000, 64), 1)
    save(tmp_path / "wide.safetensors", {"a": array})
    wide = read_header(str(tmp_path), "wide.safetensors").tensors["a"]
    elements, narrow = f4_file(tmp_path, (2000, 1001), 1)
    outs = np.empty((40_000, 8), np.uint8), np.empty((2000, 1000), elements.dtype)
    with Reader(str(tmp_path), coalesce_gap=256) as reader:
        tracemalloc.start()
        reader.read(wide, ((0, 40_000), (8, 16)), outs[0])  # 40,000 runs in 79 requests
        reader.read(narrow, ((0, 2000), (0, 1000)), outs[1])  # 2 MB unpacked out of 1 MB
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 600_000
    assert outs[0].tobytes() == part(array, ((0, 40_000), (8, 16)))
    assert outs[1].tobytes() == part(elements, ((0, 2000), (0, 1000)))
