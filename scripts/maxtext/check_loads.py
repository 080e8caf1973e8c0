"""The MaxText side: loads every converted case as MaxText does, and compares its logits with transformers'.

    python check_loads.py BUILD [--only WORD ...] [--devices 4] [--table FILE]

`setup_train_loop` is what MaxText's trainer calls: it builds the model from the MaxText config, loads `load_parameters_path` with the
strict loader, which names every missing or misshapen weight, and puts the weights on the mesh. A weight of the checkpoint that the model
did not ask for is only a warning there; here it is a failure. `from_pretrained` (loader "nnx") is what fine-tuning calls. It bends what
does not fit, so that it loads says nothing; that the logits agree does. With --devices the mesh has so many simulated CPU devices, all for
fsdp.

The settings make MaxText compute in float32 all the way, as transformers did.
"""

import argparse
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from cases import BATCH, TOKENS, Case, cases

FLOAT32: Mapping[str, object] = {
    "dtype": "float32",
    "weight_dtype": "float32",
    "matmul_precision": "highest",
    "float32_qk_product": True,
    "float32_logits": True,
    "attention": "dot_product",
    "sparse_matmul": False,
    "megablox": False,
    "capacity_factor": -1,
}
HARDWARE: Mapping[str, object] = {
    "hardware": "cpu",
    "skip_jax_distributed_system": True,
    "dataset_type": "synthetic",
    "enable_checkpointing": False,
    "enable_goodput_recording": False,
    "sharding_tolerance": 1.0,
    "log_config": False,
    "max_target_length": TOKENS,
}
OUTCOMES = {"agrees": "within {:.0e}", "differs": "more than {:.0e}, as it must", "refused": "refused, as it must be"}


@dataclass(frozen=True)
class Found:
    """What came of a case: the difference as `cases.LIMIT` defines it, the largest KL of a token, and what is wrong, "" if nothing."""

    case: Case
    difference: float
    divergence: float
    wrong: str


class Unconsumed(logging.Handler):
    """Collects MaxText's warnings of weights that its model did not ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps a line if it is such a warning."""
        if "not requested by the model" in record.getMessage():
            self.lines.append(record.getMessage())


def check(case: Case, build: Path, devices: int, unconsumed: Unconsumed) -> Found:
    """Loads one case and compares."""
    unconsumed.lines.clear()
    try:
        model = load(case, build, devices)
    except ValueError as error:
        refused = case.expects == "refused" and "does not match the model" in str(error)
        return Found(case, np.nan, np.nan, "" if refused else f"refused: {error}")
    if case.expects == "refused":
        return Found(case, np.nan, np.nan, "" if unconsumed.lines else "it was loaded")
    with np.load(build / f"logits/{case.model}.npz") as stored:
        tokens, wanted = stored["tokens"], stored["logits"]
    logits = forward(model, tokens)
    rows = wanted.shape[-1]
    difference, divergence = compare(logits[..., :rows], wanted)
    return Found(case, difference, divergence, verdict(case, difference, logits[..., rows:], unconsumed))


def load(case: Case, build: Path, devices: int) -> Any:
    """The model of MaxText's trainer with the weights of a converted case; raises MaxText's ValueError where they do not fit."""
    from maxtext.configs import pyconfig
    from maxtext.utils import model_creation_utils, train_utils

    settings = {
        **FLOAT32,
        **HARDWARE,
        "model_name": case.maxtext,
        "override_model_config": True,
        "run_name": case.name,
        "base_output_directory": str(build / "maxtext"),
        "load_parameters_path": str(build / f"out/{case.name}/0/items"),
        "per_device_batch_size": BATCH / devices,
        "ici_fsdp_parallelism": devices,
        **case.sizes(),
        **case.settings,
    }
    if case.loader == "nnx":
        return model_creation_utils.from_pretrained(pyconfig.initialize(["check_loads"], **settings))[0]
    config = pyconfig.initialize(["check_loads"], **{"scan_layers": case.scan, **settings})
    return train_utils.setup_train_loop(config, None)[3]


def forward(model: Any, tokens: np.ndarray) -> np.ndarray:
    """The logits of a model for whole, unpacked sequences."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    @nnx.jit
    def run(model: Any, tokens: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return model(
            decoder_input_tokens=tokens,
            decoder_positions=positions,
            decoder_segment_ids=jnp.ones_like(tokens),
            enable_dropout=False,
            model_mode="train",
        )

    with jax.set_mesh(model.mesh):
        return np.asarray(run(model, jnp.asarray(tokens, jnp.int32)), np.float64)


def compare(logits: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """The largest difference relative to the position's largest logit, and the largest KL divergence of a token, in nats."""
    relative = abs(logits - wanted).max(-1) / abs(wanted).max(-1)
    ours, theirs = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (logits, wanted.astype(np.float64)))
    return float(relative.max()), float((np.exp(theirs) * (theirs - ours)).sum(-1).max())


def verdict(case: Case, difference: float, padding: np.ndarray, unconsumed: Unconsumed) -> str:
    """What is wrong, or ""."""
    if case.expects == "differs":
        return "" if difference > case.limit else f"not more than {case.limit:g}"
    if unconsumed.lines:
        return unconsumed.lines[0]
    if padding.any():
        return "a row of padding is not zero"
    return "" if difference <= case.limit else f"more than {case.limit:g}"


def table(found: list[Found], devices: int) -> str:
    """Markdown."""
    packages = ("maxtext", "jax", "flax", "orbax-checkpoint", "tensorstore")
    lines = [", ".join(f"{name} {version(name)}" for name in packages) + f", {devices} device(s)", ""]
    lines += ["| case | MaxText model | layers | shardconv target | difference | KL | |", "|---|---|---|---|---|---|---|"]
    for row in found:
        case = row.case
        chosen = (*case.target.items(), *case.output.items(), *case.mesh.items())
        said = ", ".join(f"{key} = {value}" for key, value in chosen) or "as by default"
        config = ", ".join([case.maxtext, *(f"{key}={value}" for key, value in case.settings.items())])
        layers = "scanned" if case.scan else "unscanned"
        result = row.wrong.replace("\n", " ") or OUTCOMES[case.expects].format(case.limit)
        lines.append(f"| {case.name} | {config} | {layers} | {said} | {row.difference:.1e} | {row.divergence:.1e} | {result} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Checks all cases, or those with a word of --only in their names; 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path)
    parser.add_argument("--only", nargs="*", default=[""])
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--table", type=Path)
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={arguments.devices}"
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")
    from absl import logging as absl_logging

    unconsumed = Unconsumed()
    absl_logging.get_absl_logger().addHandler(unconsumed)
    absl_logging.set_verbosity(absl_logging.INFO)
    found = []
    for case in cases():
        if any(word in case.name for word in arguments.only):
            found.append(check(case, arguments.build.absolute(), arguments.devices, unconsumed))
            row = found[-1]
            sys.stdout.write(f"{case.name}: {row.difference:.1e} {row.divergence:.1e} {row.wrong or 'as expected'}\n")
            sys.stdout.flush()
    text = table(found, arguments.devices)
    if arguments.table:
        arguments.table.write_text(text)
    sys.stdout.write("\n" + text)
    return int(any(row.wrong for row in found) or not found)


if __name__ == "__main__":
    sys.exit(main())
