"""The floors of the house: a module imports from its own floor or lower ones, and heavy packages only where they are needed.

Two kinds of proof. The imports that are written down, wherever they stand in a file, are read from the source. What a command really
imports is seen in a fresh process. Both have a test that a violation is caught.
"""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# The longest prefix of a module's name counts. A new module needs a line here.
FLOORS: Mapping[str, int] = {
    "shardconv": 0,
    "shardconv.errors": 0,
    "shardconv.json_text": 0,
    "shardconv.boxes": 0,
    "shardconv.dtypes": 0,
    "shardconv.axes": 0,
    "shardconv.budget": 0,
    "shardconv.user_code": 1,
    "shardconv.route": 1,
    "shardconv.runs": 1,
    "shardconv.copying": 1,
    "shardconv.values": 1,
    "shardconv.formats": 2,
    "shardconv.source": 2,
    "shardconv.ties": 2,
    "shardconv.family": 2,
    "shardconv.families": 2,
    "shardconv.layouts": 2,
    "shardconv.sharding": 3,
    "shardconv.chunks": 3,
    "shardconv.coverage": 3,
    "shardconv.leaf": 3,
    "shardconv.units": 3,
    "shardconv.transfers": 3,
    "shardconv.placement": 3,
    "shardconv.plan": 3,
    "shardconv.sinks": 4,
    "shardconv.ledger": 4,
    "shardconv.lock": 4,
    "shardconv.run": 5,
    "shardconv.mesh": 5,
    "shardconv.mesh.choosing": 3,
    "shardconv.scaling": 3,
    "shardconv.mesh.loading": 7,
    "shardconv.mesh.checkpoints": 7,
    "shardconv.verify": 6,
    "shardconv.models": 6,
    "shardconv.interop": 1,
    "shardconv.porting": 2,
    "shardconv.porting.trees": 6,
    "shardconv.porting.jax_uses": 6,
    "shardconv.porting.torch_uses": 6,
    "shardconv.porting.agreement": 6,
    "shardconv.porting.unseen": 6,
    "shardconv.porting.epsilons": 6,
    "shardconv.porting.sources": 6,
    "shardconv.porting.mapping": 7,
    "shardconv.porting.resolving": 7,
    "shardconv.porting.matching": 7,
    "shardconv.porting.convert": 7,
    "shardconv.porting.making": 7,
    "shardconv.porting.saving": 7,
    "shardconv.porting.planned": 7,
    "shardconv.toml": 7,
    "shardconv.config_report": 7,
    "shardconv.config_sections": 7,
    "shardconv.config": 7,
    "shardconv.planning": 7,
    "shardconv.checking": 7,
    "shardconv.check_report": 7,
    "shardconv.conversion": 7,
    "shardconv.report": 7,
    "shardconv.throughput": 7,
    "shardconv.page": 7,
    "shardconv.progress": 7,
    "shardconv.inspecting": 7,
    "shardconv.init": 7,
    "shardconv.synth": 7,
    "shardconv.demo": 7,
    "shardconv.doctor": 7,
    "shardconv.door": 7,
    "shardconv.cli": 7,
    "shardconv.__main__": 7,
}

# Up to this floor, planning: the standard library and these only.
PURE_FLOOR = 3
PURE = {"numpy", "ml_dtypes"}
PURE_BUT = {"shardconv.plan": {"pydantic"}}  # a plan goes to the workers as JSON
# Beyond that: which modules may import these, by prefix. What is not listed may be imported from any floor above PURE_FLOOR.
ONLY_IN: Mapping[str, tuple[str, ...]] = {
    "tensorstore": ("shardconv.sinks", "shardconv.verify"),
    "jax": (
        "shardconv.sinks.orbax_commit",
        "shardconv.mesh.abstract",
        "shardconv.mesh.checkpoints",
        "shardconv.mesh.device",
        "shardconv.mesh.host",
        "shardconv.mesh.loading",
        "shardconv.run.member",
        "shardconv.run.window",
        "shardconv.verify",
        "shardconv.models",
        "shardconv.interop",
        "shardconv.porting.jax_uses",
        "shardconv.porting.making",
        "shardconv.porting.saving",
        "shardconv.porting.trees",
        "shardconv.porting.pooling",
        "shardconv.porting.unseen",
    ),
    "orbax": ("shardconv.sinks.orbax_commit", "shardconv.mesh.checkpoints", "shardconv.porting.saving", "shardconv.verify"),
    "ray": ("shardconv.run.ray", "shardconv.run.ray_group", "shardconv.run.nodes"),
    "torch": ("shardconv.verify", "shardconv.interop", "shardconv.porting.agreement", "shardconv.porting.torch_uses"),
    "torchax": ("shardconv.interop",),
    "transformers": ("shardconv.verify",),
    "typer": ("shardconv.cli", "shardconv.door"),
}
# What must not be loaded by a command that only plans or talks.
HEAVY = ("jax", "jaxlib", "orbax", "ray", "tensorstore", "torch", "transformers")


def under(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def floor(module: str) -> int | None:
    """The floor of a module; None where no line but the package's own speaks for it."""
    prefixes = [prefix for prefix in FLOORS if under(module, prefix)]
    best = max(prefixes, key=len, default="")
    return None if best == "shardconv" and module != "shardconv" else FLOORS.get(best)


def modules(root: Path) -> dict[str, Path]:
    """All modules of the package by dotted name."""
    found = {}
    for path in sorted(root.glob("shardconv/**/*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(module: str, path: Path, known: Mapping[str, Path]) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything a file imports, at the top or inside a function."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                # `from package import module` imports the module, `from module import name` the module it is in.
                yield node.lineno, f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base


def violations(root: Path) -> list[str]:
    """Every import that the table does not allow."""
    known = modules(root)
    found = [f"{module} has no floor; give it one in tests/test_floors.py" for module in known if floor(module) is None]
    for module, path in known.items():
        for line, name in imports(module, path, known):
            if reason := forbidden(module, name):
                found.append(f"{path.relative_to(root)}:{line}: {module} imports {name}: {reason}")
    return found


def forbidden(module: str, name: str) -> str | None:
    """Why a module may not import a name; None if it may."""
    here, there = floor(module), floor(name)
    package = name.partition(".")[0]
    if here is None or package in sys.stdlib_module_names:
        return None
    if package == "shardconv":
        return f"floor {here} imports floor {there}" if there is not None and there > here else None
    homes = ONLY_IN.get(package)
    if homes is not None and any(under(module, home) for home in homes):
        return None
    if homes is not None:
        return f"{package} belongs in {', '.join(homes)}"
    pure = PURE | PURE_BUT.get(module, set())
    return f"floor {here} imports {package}" if here <= PURE_FLOOR and package not in pure else None


def test_every_module_keeps_to_its_floor() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("path", "line", "said"),
    [
        ("route.py", "from shardconv.plan import Plan", "shardconv.route imports shardconv.plan: floor 1 imports floor 3"),
        ("route.py", "from shardconv import plan", "shardconv.route imports shardconv.plan: floor 1 imports floor 3"),
        ("route.py", "from . import plan", "shardconv.route imports shardconv.plan: floor 1 imports floor 3"),
        ("route.py", "from .plan import Plan", "shardconv.route imports shardconv.plan: floor 1 imports floor 3"),
        ("run/work.py", "from ..cli import app", "shardconv.run.work imports shardconv.cli: floor 5 imports floor 7"),
        ("plan.py", "def f():\n    import rich.table", "shardconv.plan imports rich.table: floor 3 imports rich"),
        ("route.py", "import pydantic", "shardconv.route imports pydantic: floor 1 imports pydantic"),
        ("run/local.py", "import ray", "shardconv.run.local imports ray: ray belongs in shardconv.run.ray"),
        ("sinks/zarr.py", "import jax.numpy", "shardconv.sinks.zarr imports jax.numpy: jax belongs in shardconv.sinks.orbax_commit, "),
        ("cli.py", "from orbax import checkpoint", "shardconv.cli imports orbax: orbax belongs in shardconv.sinks.orbax_commit"),
        ("utils.py", "", "shardconv.utils has no floor; give it one in tests/test_floors.py"),
    ],
)
def test_a_planted_violation_is_caught(tmp_path: Path, path: str, line: str, said: str) -> None:
    for name in ("__init__.py", "plan.py", "cli.py", "run/__init__.py", "sinks/__init__.py", path):
        (tmp_path / "shardconv" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "shardconv" / name).touch()
    (tmp_path / "shardconv" / path).write_text(f"import os\nimport numpy\n{line}\n")
    (only,) = violations(tmp_path)
    assert said in only


def test_what_is_allowed_is_not_a_violation() -> None:
    allowed = [
        ("shardconv.route", "shardconv.boxes"),
        ("shardconv.route", "ml_dtypes"),
        ("shardconv.sinks.zarr", "tensorstore"),
        ("shardconv.sinks.orbax_commit", "orbax.checkpoint"),
        ("shardconv.conversion", "shardconv.config"),
        ("shardconv.report", "rich"),
        ("shardconv.plan", "pydantic"),
        ("shardconv.run.job", "pydantic"),
    ]
    assert [pair for pair in allowed if forbidden(*pair)] == []


# What is really loaded

SEEN = """
import json, sys
try:
    {code}
except SystemExit:
    pass
print(json.dumps([name for name in {heavy!r} if name in sys.modules]))
"""


def loaded(code: str, folder: Path, heavy: tuple[str, ...] = HEAVY) -> list[str]:
    """Which heavy packages a fresh Python has loaded after some code."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}
    command = [sys.executable, "-c", SEEN.format(code=code, heavy=heavy)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=folder, timeout=60)
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, list)
    return found


@pytest.mark.parametrize(
    "code",
    [
        "import shardconv, shardconv.plan, shardconv.planning, shardconv.cli",
        "from shardconv.cli import app; app(['--help'])",
        "from shardconv.cli import app; app(['families'])",
        "from shardconv.cli import app; app(['doctor'])",
        "from shardconv.cli import app; app(['run', 'c.toml', '--set', 'workers.count=-1'])",
    ],
)
def test_talking_and_planning_load_nothing_heavy(tmp_path: Path, code: str) -> None:
    (tmp_path / "c.toml").write_text('[source]\npath = "in"\n[target]\nlayout = "flat"\n[output]\npath = "out"\n')
    assert loaded(code, tmp_path) == []


def test_a_heavy_import_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "light.py").write_text("def f():\n    import heavy.inner\n")
    (tmp_path / "heavy").mkdir()
    (tmp_path / "heavy" / "__init__.py").touch()
    (tmp_path / "heavy" / "inner.py").touch()
    assert loaded("import light", tmp_path, heavy=("heavy",)) == []
    assert loaded("import light; light.f()", tmp_path, heavy=("heavy",)) == ["heavy"]
