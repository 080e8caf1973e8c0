import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from stored import entry, raw_file

from shardconv.dtypes import DTYPES, dtype_named, dtype_of_code, raw_view, unpack_nibbles

CODES = "BOOL F4 F6_E2M3 F6_E3M2 U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ I16 U16 F16 BF16 I32 U32 F32"


def test_the_table_is_that_of_safetensors():
    assert [d.code for d in DTYPES] == [*CODES.split(), "C64", "F64", "I64", "U64"]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.code)
def test_the_library_agrees_on_code_and_bits(dtype, tmp_path):
    # it rejects an unknown code, and a size that is not shape times bits
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw_file({"a": entry(dtype.code, [8, 3], 0, 3 * dtype.bits)}, bytes(3 * dtype.bits)))
    with safe_open(path, "numpy") as file:
        assert (file.get_slice("a").get_dtype(), file.get_slice("a").get_shape()) == (dtype.code, [8, 3])
    assert dtype.nbytes((8, 3)) == 3 * dtype.bits


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.code)
def test_names_are_numpys_and_every_spelling_leads_back(dtype):
    assert dtype.numpy.name == dtype.name
    assert np.dtype(dtype.name) == dtype.numpy
    assert dtype.numpy.itemsize * 8 == max(dtype.bits, 8)
    assert dtype_of_code(dtype.code) is dtype_named(dtype.name) is dtype


@pytest.mark.parametrize(("find", "name"), [(dtype_of_code, "bf16"), (dtype_of_code, "float32"), (dtype_named, "F32")])
def test_an_unknown_dtype_is_a_key_error(find, name):
    with pytest.raises(KeyError, match=name):
        find(name)


def test_bytes_are_rounded_up():
    assert [dtype_of_code("F4").nbytes(shape) for shape in [(), (3,), (3, 2), (0, 3)]] == [1, 2, 3, 0]


def test_only_six_bit_elements_cannot_be_read():
    assert [d.code for d in DTYPES if not d.readable] == ["F6_E2M3", "F6_E3M2"]


def test_torch_means_the_same_by_every_code():
    torch = pytest.importorskip("torch")
    from safetensors.torch import _TYPES

    patterns = np.arange(256, dtype=np.uint8)
    for code, theirs in _TYPES.items():
        ours = dtype_of_code(code).numpy
        if ours.kind == "b":
            continue
        mine = patterns.view(ours)
        if ours.kind in "iuc" or ours.itemsize >= 4:
            assert np.dtype(str(theirs).removeprefix("torch.")) == ours
            continue
        values = torch.from_numpy(patterns).view(theirs).float().numpy()
        np.testing.assert_array_equal(mine.astype(np.float32), values, err_msg=code)


def test_e8m0_is_a_power_of_two():
    torch = pytest.importorskip("torch")
    patterns = np.arange(256, dtype=np.uint8)
    values = torch.from_numpy(patterns).view(torch.float8_e8m0fnu).float().numpy()
    np.testing.assert_array_equal(patterns.view(dtype_of_code("F8_E8M0").numpy).astype(np.float32), values)
    assert values[127] == 1.0


def test_f4_values_are_those_of_the_ocp_table():
    out = np.empty(16, np.uint8)
    unpack_nibbles(np.array([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], np.uint8), 0, out)
    values = out.view(ml_dtypes.float4_e2m1fn).astype(np.float32).tolist()
    half = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert values == [*half, *(-v for v in half)]


def nibbles(packed: bytes) -> list[int]:
    return [digit for byte in packed for digit in (byte & 15, byte >> 4)]


@given(st.binary(max_size=40), st.integers(0, 1), st.integers(0, 1))
def test_unpacking_any_part(packed, first, short):
    expected = nibbles(packed)[first:]
    expected = expected[: max(0, len(expected) - short)]
    out = np.full(len(expected), 255, np.uint8)
    unpack_nibbles(np.frombuffer(packed, np.uint8), first, out)
    assert out.tolist() == expected


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 7, 262144, 600_001])
def test_unpacking_within_its_own_memory(first, count):
    packed = np.random.default_rng(count).integers(0, 256, (first + count + 1) // 2, np.uint8)
    out = np.empty(count, np.uint8)
    out[count - packed.size :] = packed
    unpack_nibbles(out[count - packed.size :], first, out)
    assert out.tolist() == nibbles(packed.tobytes())[first : first + count]


def test_raw_view_keeps_every_bit_and_shares_memory():
    nans = np.array([0x7FC1, 0xFFFF, 0x8000, 0x0001], np.uint16).view(ml_dtypes.bfloat16)
    assert raw_view(nans).tolist() == [0x7FC1, 0xFFFF, 0x8000, 0x0001]
    complex_pair = np.array([1 + 2j], np.complex64)
    assert raw_view(complex_pair).tolist() == [0x40000000_3F800000]
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    raw_view(matrix.T)[2, 1] = 0
    assert matrix[1, 2] == 0
    for dtype in DTYPES:
        assert raw_view(np.zeros((), dtype.numpy)).dtype == f"uint{dtype.numpy.itemsize * 8}"
