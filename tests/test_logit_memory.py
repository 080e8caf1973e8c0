"""What a check of logits holds at once is bounded by a block of the model, on both sides, however many blocks there are."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from logit_cases import plan_of, write
from test_models import LLAMA, torch_model

from shardconv.verify import apart, fetching, logits
from shardconv.verify.logit_request import Bounds, LogitRequest

# Far more in a block than in the ends, the states of the sample, and all else.
WIDE = {**LLAMA, "hidden_size": 96, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 62, "max_position_embeddings": 128}


def of_torch() -> int:
    """Bytes of all torch tensors that are alive."""
    import torch

    found = (one for one in gc.get_objects() if issubclass(type(one), torch.Tensor))
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in found if one.device.type == "cpu"}.values())


def of_jax() -> int:
    """Bytes of all JAX arrays that are alive."""
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, int]]:
    """Looks at what is alive whenever a block is loaded or an array fetched; gives the most, less what was before."""
    pytest.importorskip("torch")
    before = {"torch": of_torch(), "jax": of_jax()}
    most = dict(before)

    def watch(module: Any, name: str, side: str, count: Callable[[], int]) -> None:
        call = getattr(module, name)

        def watching(*given: Any, **named: Any) -> Any:
            found = call(*given, **named)
            most[side] = max(most[side], count())
            return found

        monkeypatch.setattr(module, name, watching)

    watch(apart, "block", "torch", of_torch)
    watch(fetching, "fetch", "jax", of_jax)
    return lambda: {side: most[side] - before[side] for side in most}


def test_both_sides_hold_a_block_and_not_the_model(tmp_path: Path, watched: Callable[[], dict[str, int]]) -> None:
    with apart.quiet():
        model = torch_model(WIDE)
        model.save_pretrained(tmp_path / "source", max_shard_size="1MB")
    block = sum(weight.nbytes for weight in model.model.layers[0].parameters())
    del model
    checkpoint = write(plan_of(tmp_path / "source", "maxtext"), tmp_path)
    request = LogitRequest(checkpoint, str(tmp_path / "source"), "auto", {}, "auto", (64,), 0, None, Bounds(), trace=False, memory=block)
    assert logits.check(request).report.same
    held = watched()
    # A block of each as it is stored and in float32, and the states; six blocks are in the model.
    assert block < held["torch"] < 3 * block, (held, block)
    assert block < held["jax"] < 3 * block, (held, block)
