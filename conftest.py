"""Modules that need an extra are not looked through for examples where it is not installed; `tests/conftest.py` has the rest."""

from importlib.util import find_spec

NEEDS = {
    "shardconv/interop/statistics.py": "torchax",
    "shardconv/interop/views.py": "torch",
    "tests/own_models.py": "equinox",
    "tests/porting_flows.py": "equinox",
    "tests/porting_layers.py": "equinox",
    "tests/porting_models.py": "equinox",
    "tests/porting_products.py": "equinox",
    "tests/porting_targets.py": "equinox",
    "tests/torch_models.py": "torch",
    "tests/user_models.py": "equinox",
}

collect_ignore = [module for module, library in NEEDS.items() if find_spec(library) is None]
