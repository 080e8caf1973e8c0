# make demo   convert a checkpoint of about 1 GB, made on the spot
# make test   lint, types and tests
# make slow   the tests that `make test` leaves out: more cases of the same kinds; twenty minutes
# make lint   lint and types only
# make bench  measure the figures of docs/benchmarks.md again; needs 30 GB of disk and a quarter of an hour
# make mutate seed faults into the algebra and see its tests kill them; four minutes
# make faults seed faults into conversions and see the checks catch them, and sound ones pass; a quarter of an hour
# make kills  kill conversions at 220 random moments and at every step of their end, go on, compare; half an hour
# make nodes  cut off a node of a cluster in network namespaces, add another, with a mesh too; as root, on Linux; five minutes
# make soak   a hundred conversions in one process, and what they leave; ten minutes
# make orbax  the store's tests under every Orbax that is said to work; ten minutes
# make fuzz   feed the readers of headers, indexes, PyTorch files and addresses half an hour of mutated files each; two hours
# make clean  remove what these leave behind
#
# Each sets up what it needs under .venv, once, and again when pyproject.toml changes.
# On another Python, without torch: make test PYTHON=python3.12 EXTRAS=test

SHELL := /bin/sh
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
EXTRAS ?= dev
PYTEST_ARGS ?=

PLAIN := .venv/plain-$(notdir $(PYTHON))
FULL := .venv/$(EXTRAS)-$(notdir $(PYTHON))
FUZZ := .venv/fuzz-$(notdir $(PYTHON))

.PHONY: demo test slow lint bench mutate faults kills nodes soak orbax fuzz clean

demo: $(PLAIN)/.ready
	$(PLAIN)/bin/python -m shardconv.demo build/demo

test: lint
	$(FULL)/bin/python -m pytest $(PYTEST_ARGS)

slow: $(FULL)/.ready
	$(FULL)/bin/python -m pytest -m slow $(PYTEST_ARGS)

lint: $(FULL)/.ready
	$(FULL)/bin/ruff check .
	$(FULL)/bin/mypy

bench: $(FULL)/.ready
	$(FULL)/bin/python scripts/benchmark.py build/bench --peer

mutate: $(FULL)/.ready
	$(FULL)/bin/python scripts/mutate.py

faults: $(FULL)/.ready
	$(FULL)/bin/python scripts/faults/suite.py
	$(FULL)/bin/python scripts/faults/suite.py --clean 50

kills: $(FULL)/.ready
	$(FULL)/bin/python scripts/reliability/kills.py build/kills

nodes: $(FULL)/.ready
	rm -rf build/nodes
	$(FULL)/bin/python scripts/clusters/namespaces.py build/nodes
	$(FULL)/bin/python scripts/clusters/mesh.py build/nodes/mesh

soak: $(FULL)/.ready
	mkdir -p build/tmp
	TMPDIR=$(CURDIR)/build/tmp PYTHONPATH=$(CURDIR) $(FULL)/bin/python scripts/reliability/soak.py build/soak

orbax:
	PYTHON=$(PYTHON) sh scripts/test_orbax_versions.sh

fuzz: $(FUZZ)/.ready
	for target in safetensors index pickle address; do $(FUZZ)/bin/python scripts/fuzz/run.py $$target || exit 1; done

clean:
	rm -rf .venv build shardconv.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The stamp is written last, so that an interrupted installation is not taken for one.
define install
	@test -n "$(PYTHON)" || { echo "shardconv needs Python 3.11 or later, and none was found"; exit 1; }
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --editable '$(2)'
	@touch $(1)/.ready
endef

$(PLAIN)/.ready: pyproject.toml
	$(call install,$(PLAIN),.)

$(FUZZ)/.ready: pyproject.toml
	$(call install,$(FUZZ),.[fuzz])

$(FULL)/.ready: pyproject.toml
	$(call install,$(FULL),.[$(EXTRAS)])
