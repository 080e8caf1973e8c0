"""What a plan takes on many hosts: even, read once, and as docs/scaling.md says."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from scaling import GIGABYTE_PER_SECOND, JOBS, Job, line, rows

from shardconv.scaling import Projection

PAGE = (Path(__file__).parents[1] / "docs/scaling.md").read_text()


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_a_large_model_on_many_hosts(tmp_path: Path, job: Job) -> None:
    for row in rows(job, tmp_path, GIGABYTE_PER_SECOND):
        projection, size = row.projection, row.plan.target_bytes
        assert len(projection.read) == job.hosts
        assert projection.balance < 1.1
        assert sum(projection.written) == size
        assert size <= sum(projection.read) < 1.01 * size
        assert max(projection.read) < 1.1 * size / job.hosts
        assert projection.seconds < 1.1 * 2 * size / job.hosts / 1e9
        assert line(row) in PAGE


def test_balance_is_of_what_a_host_moves() -> None:
    assert Projection((10, 10), (10, 30), 1.0).balance == pytest.approx(4 / 3)
