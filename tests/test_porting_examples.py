"""The examples: whole models written by hand in JAX, ported from PyTorch, compared feature by feature.

The bound at each feature is the noise there: what float32 results of the PyTorch model differ by from those in float64, at most. The
controls are mistakes that load without an error.
"""

import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("flax")
pytest.importorskip("equinox")

import equinox as eqx  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402
from test_floors import ROOT  # noqa: E402
from torch_models import ResNet, UNet, shaken  # noqa: E402

import shardconv  # noqa: E402
from shardconv.config import RunOptions, load_config  # noqa: E402
from shardconv.conversion import run  # noqa: E402

EXAMPLES = ROOT / "examples"
sys.path.append(str(ROOT))

from examples import dinov3_equinox, dinov3_nnx, dinov3_rope, resnet, unet  # noqa: E402

FACTOR = 4.0
QUICK = {"xla_backend_optimization_level": 0}  # XLA takes longer over these models than they run
KEY = jax.random.key(0)
Array = np.ndarray[Any, Any]


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Flax and Equinox broadcast, and matrices are multiplied in float32."""
    with jax.default_matmul_precision("highest"), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def images(height: int, width: int) -> Array:
    return np.random.default_rng(0).standard_normal((2, 3, height, width)).astype(np.float32)


def channels_first(features: Mapping[str, Any]) -> dict[str, Array]:
    return {name: np.moveaxis(np.asarray(value, np.float64), -1, 1) for name, value in features.items()}


def in_torch(module: Any, x: Array, features: Callable[[Any], Mapping[str, Any]]) -> tuple[dict[str, Array], dict[str, float]]:
    """The features of a torch model in float32, and the noise of each."""
    with torch.inference_mode():
        found = {name: value.double().numpy() for name, value in features(module(torch.from_numpy(x))).items()}
        truth = {name: value.numpy() for name, value in features(module.double()(torch.from_numpy(x).double())).items()}
    return found, {name: float(abs(found[name] - truth[name]).max()) for name in found}


def worst(found: Mapping[str, Array], expected: Mapping[str, Array], noise: Mapping[str, float]) -> dict[str, float]:
    """Largest differences, in noises."""
    assert found.keys() == expected.keys()
    return {name: float(abs(found[name] - expected[name]).max()) / noise[name] for name in expected}


@pytest.mark.parametrize(("depths", "width"), [((1, 2, 1, 1), 8), ((3, 4, 6, 3), 64)], ids=["small", "ResNet-50"])
def test_resnet(depths: tuple[int, ...], width: int) -> None:
    torch.manual_seed(0)
    module, x = shaken(ResNet(depths, width, 10)), images(64, 48)
    model = resnet.ResNet(depths, width, 10)
    last = jnp.asarray(np.moveaxis(x, 1, -1))
    shapes = jax.eval_shape(model.init, KEY, last)
    variables = shardconv.convert_module(module, shapes, resnet.MAPPING)
    for source in (module, module.state_dict()):  # names and shapes say all of the mapping
        assert jax.tree.all(jax.tree.map(np.array_equal, shardconv.convert_module(source, shapes), variables))
    forward = jax.jit(model.apply, compiler_options=QUICK)
    found = channels_first(forward(variables, last))
    other = dict(variables["params"], stem_norm=dict(variables["params"]["stem_norm"], bias=variables["params"]["stem_norm"]["scale"]))
    wrong = channels_first(forward({**variables, "params": other}, last))
    expected, noise = in_torch(module, x, lambda features: features)
    assert max(worst(found, expected, noise).values()) < FACTOR
    assert min(worst(wrong, expected, noise).values()) > 100 * FACTOR


def test_unet() -> None:
    torch.manual_seed(0)
    module, x = shaken(UNet()), images(32, 24)
    model = unet.UNet()
    last = jnp.asarray(np.moveaxis(x, 1, -1))
    variables = shardconv.convert_module(module, jax.eval_shape(model.init, KEY, last), {"": ""})
    forward = jax.jit(model.apply, compiler_options=QUICK)
    found = channels_first(forward(variables, last))
    kernel = variables["params"]["up0"]["kernel"]
    turned = {**variables["params"], "up0": {**variables["params"]["up0"], "kernel": kernel[::-1, ::-1]}}
    wrong = channels_first(forward({**variables, "params": turned}, last))
    expected, noise = in_torch(module, x, lambda features: features)
    assert max(worst(found, expected, noise).values()) < FACTOR
    assert worst(wrong, expected, noise)["out"] > 100 * FACTOR


# DINOv3


def hugging_face(layers: int) -> tuple[Any, dinov3_rope.Sizes]:
    """ViT-S/16 with random weights, of some layers."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.DINOv3ViTConfig(num_hidden_layers=layers, num_register_tokens=4)
    module = shaken(transformers.DINOv3ViTModel(config))
    with torch.no_grad():
        for name, value in module.named_parameters():
            if "token" in name:
                value.normal_()
    return module, dinov3_rope.Sizes(layers=layers)


def meta_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """The same weights as Meta's files have them: fused, with a key bias that a mask takes away."""
    found = {}
    names = {
        "embeddings.patch_embeddings": "patch_embed.proj",
        "embeddings.cls_token": "cls_token",
        "embeddings.register_tokens": "storage_tokens",
        "model.layer": "blocks",
        "attention.o_proj": "attn.proj",
        "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
        "mlp.up_proj": "mlp.fc1",
        "mlp.down_proj": "mlp.fc2",
    }
    for name, value in state.items():
        for old, new in names.items():
            name = name.replace(old, new)
        found[name] = value
    found["mask_token"] = found.pop("embeddings.mask_token")[0]
    for block in {name.split(".")[2] for name in state if name.startswith("model.layer.")}:
        prefix, old = f"blocks.{block}.attn.qkv", f"blocks.{block}.attention"
        found[f"{prefix}.weight"] = torch.cat([found.pop(f"{old}.{part}_proj.weight") for part in "qkv"])
        query, value = found.pop(f"{old}.q_proj.bias"), found.pop(f"{old}.v_proj.bias")
        found[f"{prefix}.bias"] = torch.cat([query, torch.full_like(query, 3.0), value])
        found[f"{prefix}.bias_mask"] = torch.cat([torch.ones_like(query), torch.zeros_like(query), torch.ones_like(value)])
    found["rope_embed.periods"] = torch.ones(16, dtype=torch.bfloat16)
    return found


def model_of(library: str, sizes: dinov3_rope.Sizes) -> Any:
    if library == "nnx":
        return nnx.eval_shape(lambda: dinov3_nnx.DINOv3(sizes, nnx.Rngs(0)))
    return eqx.filter_eval_shape(dinov3_equinox.DINOv3, sizes, KEY)


def tokens(library: str, model: Any, x: Array, masked: Array) -> dict[str, Array]:
    """The tokens before the first block, after each, and after the norm."""
    if library == "nnx":
        structure, state = nnx.split(model)
        run = jax.jit(lambda state, x, masked: jax.vmap(nnx.merge(structure, state))(x, masked), compiler_options=QUICK)
        found = run(state, jnp.asarray(np.moveaxis(x, 1, -1)), jnp.asarray(masked))
    else:
        arrays, rest = eqx.partition(model, eqx.is_array)
        run = jax.jit(lambda arrays, x, masked: jax.vmap(eqx.combine(arrays, rest))(x, masked), compiler_options=QUICK)
        found = run(arrays, jnp.asarray(x), jnp.asarray(masked))
    return {str(place): np.asarray(value, np.float64) for place, value in enumerate(found)}


@pytest.mark.parametrize("layers", [2, 12], ids=["two layers", "ViT-S"])
@pytest.mark.parametrize("library", ["nnx", "equinox"])
def test_dinov3(library: str, layers: int, tmp_path: Path) -> None:
    module, sizes = hugging_face(layers)
    module.save_pretrained(tmp_path)
    x = images(48, 32)
    masked = np.random.default_rng(1).random((2, 6)) < 0.3
    model = shardconv.convert_module(tmp_path, model_of(library, sizes), EXAMPLES / f"dinov3_{library}.toml")
    found = tokens(library, model, x, masked)
    other = shardconv.convert_module(meta_names(module.state_dict()), model_of(library, sizes), EXAMPLES / f"dinov3_{library}_meta.toml")
    leaves = [jax.tree.leaves(nnx.state(one) if library == "nnx" else eqx.filter(one, eqx.is_array)) for one in (model, other)]
    assert all(np.array_equal(a, b) for a, b in zip(*leaves, strict=True)) and len(leaves[0]) > 20

    def features(output: Any) -> dict[str, Any]:
        return {str(place): value for place, value in enumerate([*output.hidden_states, output.last_hidden_state])}

    def run(x: Any) -> Any:
        return module(x, bool_masked_pos=torch.from_numpy(masked), output_hidden_states=True)

    with torch.inference_mode():
        expected = {name: value.double().numpy() for name, value in features(run(torch.from_numpy(x))).items()}
        module.double()
        truth = {name: value.numpy() for name, value in features(run(torch.from_numpy(x).double())).items()}
    noise = {name: float(abs(expected[name] - truth[name]).max()) for name in expected}
    assert max(worst(found, expected, noise).values()) < FACTOR
    if library == "equinox":
        swapped = eqx.tree_at(lambda model: (model.blocks[0].query.weight, model.blocks[0].key.weight), model, replace_fn=lambda w: w.T)
        assert worst(tokens(library, swapped, x, masked), expected, noise)["1"] > 100 * FACTOR


def leaves_of(model: Any) -> list[Any]:
    return jax.tree.leaves(nnx.state(model) if isinstance(model, nnx.Module) else eqx.filter(model, eqx.is_array))


@pytest.mark.parametrize("names", ["Hugging Face", "Meta"])
@pytest.mark.parametrize("library", ["nnx", "equinox"])
def test_the_config_for_dinov3(library: str, names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run writes is, bit for bit, what `convert_module` gives, whose features the test above compares."""
    monkeypatch.chdir(ROOT)
    module, sizes = hugging_face(12)
    mapping = EXAMPLES / f"dinov3_{library}{'' if names == 'Hugging Face' else '_meta'}.toml"
    if names == "Meta":
        torch.save(meta_names(module.state_dict()), tmp_path / "dinov3_vits16.pth")
    else:
        module.save_pretrained(tmp_path)
    here = {"source.path": tmp_path, "output.path": tmp_path / "out", "workers.executor": "local", "workers.count": 1}
    chosen = {**here, "target.layout": f"examples.dinov3_{library}:make_model", "target.mapping": mapping.relative_to(ROOT)}
    config = load_config("configs/dinov3_vits16.toml", [f"{key}={value}" for key, value in chosen.items()])
    report = run(config, RunOptions(restart=False, overwrite=False, verbosity=-1, json_logs=False))
    expected = shardconv.convert_module(tmp_path, model_of(library, sizes), mapping)
    found = shardconv.load_module(tmp_path / "out", model_of(library, sizes))
    assert report["check"]["equal"] and report["read_amplification"] < 1.01  # masks are read for each part
    assert len(leaves_of(found)) > 200
    assert all(np.array_equal(a, b) for a, b in zip(leaves_of(found), leaves_of(expected), strict=True))


@pytest.mark.parametrize("library", ["nnx", "equinox"])
def test_names_and_shapes_say_all_of_dinov3(library: str, tmp_path: Path) -> None:
    module, sizes = hugging_face(2)
    module.save_pretrained(tmp_path)
    models = [shardconv.convert_module(tmp_path, model_of(library, sizes), by) for by in (None, EXAMPLES / f"dinov3_{library}.toml")]
    leaves = [leaves_of(model) for model in models]
    assert all(np.array_equal(a, b) for a, b in zip(*leaves, strict=True)) and len(leaves[0]) > 20


def test_a_mask_that_was_not_loaded_is_refused() -> None:
    module, sizes = hugging_face(1)
    state = meta_names(module.state_dict())
    state["blocks.0.attn.qkv.bias_mask"].fill_(float("nan"))
    with pytest.raises(shardconv.errors.InputError) as caught:
        shardconv.convert_module(state, model_of("nnx", sizes), EXAMPLES / "dinov3_nnx_meta.toml")
    assert "the mask has other numbers than 0 and 1: it has not been loaded from the checkpoint" in str(caught.value)


def test_a_key_bias_that_is_not_masked_is_not_lost_in_silence() -> None:
    module, sizes = hugging_face(1)
    state = meta_names(module.state_dict())
    state["blocks.0.attn.qkv.bias_mask"].fill_(1.0)
    with pytest.raises(shardconv.errors.InputError) as caught:
        shardconv.convert_module(state, model_of("nnx", sizes), EXAMPLES / "dinov3_nnx_meta.toml")
    assert "blocks.0.attn.qkv.bias: 384 of its 1152 elements go nowhere" in str(caught.value)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_mappings_are_toml(path: Path) -> None:
    assert set(tomllib.loads(path.read_text())) == {"ignore", "mapping"}
