"""The scheduler's property: whatever dies or fails, every unit is finished exactly once, and every chunk is written whole and once.

Hypothesis draws what happens to each attempt at each unit: it does well, its process dies before or after the record, it fails, it hangs.
Real processes carry it out (`fated_units`), one pool of workers per example. What may happen thrice to a unit ends the run, so at most two
accidents are drawn per unit.
"""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from conversions import Conversion, make_config, make_source, plan_finely
from fated_units import ACCIDENTS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardconv.boxes import box_shape, chunk_box
from shardconv.ledger import Ledger
from shardconv.run import Finished, Patience, Retried
from shardconv.run.local import execute

UNITS = 9
fates = st.dictionaries(st.integers(0, UNITS - 1), st.lists(st.sampled_from(ACCIDENTS), min_size=1, max_size=2), max_size=5)


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(fates=fates, count=st.integers(2, 3), recorded=st.sets(st.integers(0, UNITS - 1), max_size=4))
def test_every_unit_is_finished_exactly_once_whatever_dies(fates: Mapping[int, list[str]], count: int, recorded: set[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(os.path.join(folder, "out.shardconv"))
        ledger.create()
        Path(ledger.state, "fates.json").write_text(json.dumps(fates))
        units = [unit for unit in range(UNITS) if unit not in recorded]
        patience = Patience(name_after=1.0, give_up_after=3.0)
        events = list(execute(ledger.state, units, work="fated_units:run", count=count, patience=patience, name=str, verbose=False))
        assert Counter(event.unit for event in events if isinstance(event, Finished)) == Counter(units)
        accidents = Counter({unit: len(some) for unit, some in fates.items() if unit in units})
        assert Counter(event.unit for event in events if isinstance(event, Retried)) == +accidents
        records = ledger.finished()
        assert sorted(records) == units
        # The record is that of the first attempt which got so far, and the others' files are not its.
        for unit, record in records.items():
            tries = Path(ledger.state, f"tries-{unit}").read_text().split()
            assert len(tries) == accidents[unit] + 1
            assert record["attempt"] == next(a for a, fate in zip(tries, [*fates.get(unit, []), "does well"], strict=True)
                                             if fate in ("does well", "dies after the record"))  # fmt: skip


@pytest.fixture(scope="module")
def conversion(tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    root = tmp_path_factory.mktemp("scheduling")
    config = make_config(root, make_source(root), "output.chunk_bytes=8192")
    return Conversion(root, config, plan_finely(config))


def test_the_units_of_a_plan_are_all_chunks_once(conversion: Conversion) -> None:
    spans = [span for unit in conversion.plan.units for span in unit.spans]
    chunks = Counter((span.leaf, chunk) for span in spans for chunk in range(span.start, span.stop))
    assert chunks == Counter((n, chunk) for n, leaf in enumerate(conversion.plan.leaves) for chunk in range(leaf.chunks))
    assert len(chunks) > 2 * len(conversion.plan.leaves)


def test_every_chunk_is_written_whole_and_once(conversion: Conversion, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk that is part of a larger stored one would have to be read, modified and written: no write is less than one."""
    from shardconv.sinks.shard_writer import ShardWriter

    written: Counter[tuple[str, tuple[int, ...]]] = Counter()
    put = ShardWriter.put

    def watch(self: ShardWriter, spec, index, array) -> None:  # type: ignore[no-untyped-def]
        written[spec.name, index] += 1
        assert array.shape == box_shape(spec.box(index))
        put(self, spec, index, array)

    monkeypatch.setattr(ShardWriter, "put", watch)
    outcome = conversion.drive()
    leaves = conversion.plan.leaves
    assert written == Counter((leaf.name, index) for leaf in leaves for index in np.ndindex(*_grid(leaf)))
    assert sum(int(str(record["chunks"])) for record in outcome.records.values()) == sum(leaf.chunks for leaf in leaves)


def _grid(leaf) -> tuple[int, ...]:  # type: ignore[no-untyped-def]
    last = chunk_box(leaf.shape, leaf.chunk, leaf.chunks - 1)
    return tuple(start // side + 1 for (start, _), side in zip(last, leaf.chunk, strict=True))
