#!/bin/sh
# The tests of the store under one Orbax after another: scripts/test_orbax_versions.sh [VERSION...]
#
# Without arguments: the lowest supported, the first whose v1 API reads what v0 wrote, the first after v1's renaming of "pytree" to "state",
# and the newest. Each version gets a virtual environment of its own under build/orbax.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
[ $# -gt 0 ] || set -- 0.11.26 0.11.36 0.12.0 newest
failed=
for version in "$@"; do
    venv=build/orbax/$version
    pin=orbax-checkpoint$([ "$version" = newest ] || echo "==$version")
    if [ ! -e "$venv/.ready" ]; then
        "$PYTHON" -m venv "$venv"
        "$venv/bin/python" -m pip install --quiet --editable '.[test]' "$pin"
        touch "$venv/.ready"
    fi
    "$venv/bin/python" -c 'import jax, orbax.checkpoint as o, tensorstore; print("== orbax", o.__version__, "jax", jax.__version__)'
    "$venv/bin/python" -m pytest -q tests/test_store.py tests/test_commit.py || failed="$failed $version"
done
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
