"""The PyTorch side: a model taken apart gives what the whole one gives; its noise; its files; and what it is asked."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from logit_cases import cases
from test_models import LLAMA, MODELS, tokens_for, torch_model

from shardconv.errors import ConfigError, InputError
from shardconv.verify import apart, noise, reference, sample
from shardconv.verify.logit_request import LENGTHS, Rounding
from shardconv.verify.noise import HALF, ORDERS, PLAIN, ROUNDED
from shardconv.verify.published import Published


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cases(tmp_path_factory)


def saved(config: dict[str, Any], folder: Path, **options: Any) -> Any:
    """The whole model, written by transformers."""
    with apart.quiet():
        model = torch_model(config)
        model.save_pretrained(folder, **options)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_a_model_taken_apart_is_the_whole_model(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    model = saved(MODELS[name], tmp_path, max_shard_size="30KB")
    tokens = tokens_for(MODELS[name], 2)
    asked = [tokens[0], tokens[1][:70]]
    parts = reference.load_reference(str(tmp_path), {})
    steps = list(parts.steps(asked))
    spoken = list(parts.head().spoken(asked, steps[-1].states))
    for number, one in enumerate(asked):
        with torch.no_grad():
            whole = model(input_ids=torch.from_numpy(one)[None], output_hidden_states=True, use_cache=False)
        # Experts take tokens of all sequences at once, so that their products may be summed in another order.
        exact = 0.0 if not parts.architecture.chosen else 4e-6
        np.testing.assert_allclose(spoken[number].logits[PLAIN], whole.logits[0].numpy(), atol=exact, rtol=0)
        for step, state in zip(steps[:-1], whole.hidden_states, strict=False):
            np.testing.assert_allclose(step.states[PLAIN][number, : len(one)], state[0].numpy(), atol=exact, rtol=0)
        assert np.array_equal(spoken[number].logits[ROUNDED], spoken[number].logits[PLAIN])
        for run in ORDERS:
            assert 0 < np.abs(spoken[number].logits[run] - spoken[number].logits[PLAIN]).max() < 5e-5
        assert np.abs(spoken[number].logits[HALF] - spoken[number].logits[PLAIN]).max() > 1e-3
    assert [step.name for step in steps] == ["embed", *(f"block {number}" for number in range(parts.architecture.layers))]
    assert all(bool(step.scores) is ("block" in step.name and parts.architecture.chosen > 0) for step in steps)


def test_pickled_weights_are_read_as_well(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    model, tokens = saved(LLAMA, tmp_path), tokens_for(LLAMA, 1)
    torch.save(dict(model.state_dict()), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    steps = list(reference.load_reference(str(tmp_path), {}).steps(list(tokens)))
    with torch.no_grad():
        states = model(input_ids=torch.from_numpy(tokens), output_hidden_states=True).hidden_states
    np.testing.assert_array_equal(steps[2].states[PLAIN], states[2].numpy())


def test_another_order_of_sums_changes_bits_and_nothing_else() -> None:
    torch = pytest.importorskip("torch")
    model, tokens = torch_model(MODELS["experts"]), torch.from_numpy(tokens_for(MODELS["experts"], 1))

    def run() -> Any:
        with torch.no_grad():
            return model(input_ids=tokens).logits.numpy()

    before = run()
    for one in (noise.sums(1), noise.nudged(model, 1), noise.computing(ORDERS[0], model), noise.computing(ORDERS[1], model)):
        with one:
            other = run()
        assert not np.array_equal(other, before)
        np.testing.assert_allclose(other, before, atol=5e-5)
        np.testing.assert_array_equal(run(), before)


def test_weights_are_rounded_as_stored() -> None:
    torch = pytest.importorskip("torch")
    weight, other = torch.randn(7, 5), torch.randn(3)
    found = noise.rounded({"norm": weight, "kept": other}, {"norm": Rounding("bfloat16", 3.0, 1.0), "elsewhere": Rounding("float16")})
    stored = (weight.numpy().astype(np.float64) * 3.0 + 1.0).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(found["norm"].numpy(), ((stored.astype(np.float64) - 1.0) / 3.0).astype(np.float32))
    assert found["kept"] is other and found.keys() == {"norm", "kept"}


@pytest.mark.parametrize("name", ["experts", "tied", "caps, windows in turn, four norms"])
def test_a_rounded_reference_is_the_model_with_rounded_weights(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    model = saved(MODELS[name], tmp_path, save_original_format=True)
    tokens = tokens_for(MODELS[name], 1)
    keys = [key for number in (None, 0, 1, 2, 3) for key in Published(str(tmp_path)).tensors(number)]
    found = reference.load_reference(str(tmp_path), {key: Rounding("bfloat16") for key in keys})
    *_, last = found.steps(list(tokens))
    spoken = next(found.head().spoken(list(tokens), last.states)).logits
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(torch.bfloat16))
        expected = model(input_ids=torch.from_numpy(tokens)).logits[0].numpy()
    np.testing.assert_allclose(spoken[ROUNDED], expected, atol=4e-6, rtol=0)
    assert np.abs(spoken[ROUNDED] - spoken[PLAIN]).max() > 1e-3


# Files that do not fit


def test_a_reference_whose_files_lack_a_weight_is_none(case: Any, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    made = case("mistral")
    stored = {key: value for file in made.source.glob("*.safetensors") for key, value in safetensors.load_file(file).items()}
    lost = stored.pop("model.layers.2.mlp.up_proj.weight")
    stored["model.layers.0.mlp.up_proj.weight"] = stored["model.layers.0.mlp.up_proj.weight"].T.contiguous()
    stored |= {"model.layers.2.mlp.extra": lost, "model.layers.4.mlp.extra": lost.clone(), "more": lost.clone()}
    del stored["model.norm.weight"]
    safetensors.save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((made.source / "config.json").read_text())
    with pytest.raises(InputError) as caught:
        list(reference.load_reference(str(tmp_path), {}).steps(made.sample))
    assert str(caught.value) == (
        "transformers' model and the checkpoint do not fit each other (6 problems):\n"
        f"  {tmp_path} has no model.norm.weight\n"
        f"  {tmp_path} has model.layers.4.mlp.extra, which the model has not\n"
        f"  {tmp_path} has more, which the model has not\n"
        f"  {tmp_path} has model.layers.0.mlp.up_proj.weight in another shape\n"
        f"  {tmp_path} has no model.layers.2.mlp.up_proj.weight\n"
        f"  {tmp_path} has model.layers.2.mlp.extra, which the model has not"
    )


def test_without_torch_there_is_no_comparison(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(reference.importlib.util, "find_spec", lambda name: None if name == "torch" else name)
    with pytest.raises(ConfigError) as caught:
        reference.load_reference(str(tmp_path), {})
    assert str(caught.value) == (
        "comparing logits needs the PyTorch model (1 problem):\n"
        "  torch is not installed\n"
        '      pip install "shardconv[check]", or set check.mode = "weights"'
    )


def test_a_directory_without_a_decoder(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match=r"has no config\.json"):
        reference.load_reference(str(tmp_path), {})
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(InputError, match="transformers has no decoder for model_type 'vit'"):
        reference.load_reference(str(tmp_path), {})
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="has no weights that transformers would load"):
        reference.load_reference(str(tmp_path), {})


# The sample


def test_random_samples_are_seeded_and_long_enough_for_rope_to_show() -> None:
    asked = sample.random_sample(50, seed=1)
    assert [len(tokens) for tokens in asked] == list(LENGTHS) and min(LENGTHS) >= 64
    assert all(tokens.min() >= 0 and tokens.max() < 50 for tokens in asked)
    again, other = sample.random_sample(50, seed=1), sample.random_sample(50, seed=2)
    assert all(np.array_equal(a, b) for a, b in zip(asked, again, strict=True)) and not np.array_equal(asked[0], other[0])


def test_prompts_go_through_the_sources_tokenizer(tmp_path: Path) -> None:
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"once": 0, "upon": 1, "a": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    (tmp_path / "prompts.txt").write_text("a a upon\n\nonce upon a time\n")
    asked = sample.prompt_sample(str(tmp_path / "prompts.txt"), str(tmp_path))
    assert [tokens.tolist() for tokens in asked] == [[2, 2, 1], [0, 1, 2, 3]]
    (tmp_path / "prompts.txt").write_text("\n")
    with pytest.raises(InputError, match=r"prompts\.txt has no lines"):
        sample.prompt_sample(str(tmp_path / "prompts.txt"), str(tmp_path))
    with pytest.raises(InputError, match="the prompts cannot be read"):
        sample.prompt_sample(str(tmp_path / "none.txt"), str(tmp_path))
