"""What torch.save writes, read without torch: every byte where torch.load has it, and every other thing refused by name."""

import pytest

torch = pytest.importorskip("torch")

from shardconv.formats.pytorch import read_torch  # noqa: E402


def test_a_state_dict_is_byte_ranges(tmp_path):
    state = torch.nn.Linear(3, 4).to(torch.bfloat16).state_dict()
    torch.save(state, tmp_path / "m.bin")
    raw = (tmp_path / "m.bin").read_bytes()
    for name, tensor in read_torch(str(tmp_path), "m.bin", "").tensors.items():
        assert raw[tensor.offset : tensor.offset + tensor.nbytes] == state[name].view(torch.uint8).numpy().tobytes()
