"""What every test runs under: eight CPU devices, strict JAX, a quiet Ray, no network.

All of it is environment, set before anything imports JAX or Ray, so that subprocesses and Ray's workers run under the same rules.
"""

import os

import pytest
from slow_cases import KEPT

os.environ.update(
    {
        # A mesh of eight on one machine: enough for two axes, and a checkpoint restored on it shows a wrong PartitionSpec.
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        # No silent widening of dtypes, no silent broadcasting over ranks.
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        # Nothing of Ray's goes to the terminal or to its makers, and no cluster that happens to run is joined.
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_LOG_TO_DRIVER": "0",
        "RAY_ENABLE_RECORD_ACTOR_TASK_LOGGING": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # The tests make their own models.
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
)
os.environ.pop("RAY_ADDRESS", None)

@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is slow before `-m` looks at it."""
    for item in items:
        name, _, case = item.name.partition("[")
        kept = KEPT.get(f"{item.path.name}::{name}")
        if kept is not None and not any(word in case for word in kept):
            item.add_marker(pytest.mark.slow)
