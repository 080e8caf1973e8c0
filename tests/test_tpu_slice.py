"""A TPU slice of two hosts, as far as Ray knows: four environment variables and a resource per node make all that Ray makes of a real one.

A conversion by its CPUs runs while all its chips are taken, so no task of it asks for one.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conversions import make_config, make_source, restored, stored
from ray_nodes import Nodes, nodes

ray = pytest.importorskip("ray")

HERE = Path(__file__).parent
SLICE = {"TPU_ACCELERATOR_TYPE": "v5p-16", "TPU_TOPOLOGY": "2x2x2", "TPU_NAME": "v5p-0"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    with nodes() as cluster:
        cluster.start("--num-cpus=0")
        for host in range(2):
            cluster.start("--num-cpus=2", '--resources={"TPU": 4}', TPU_WORKER_ID=str(host), **SLICE)
        ray.init(address=cluster.address, logging_level="ERROR")
        yield cluster
        ray.shutdown()


def test_ray_makes_of_the_hosts_what_the_launch_files_say(cluster: Nodes) -> None:
    hosts = {node["Labels"]["ray.io/tpu-worker-id"]: node for node in ray.nodes() if node["Resources"].get("TPU")}
    assert sorted(hosts) == ["0", "1"]
    for host in hosts.values():
        assert host["Resources"].items() >= {"TPU": 4.0, "accelerator_type:TPU-V5P": 1.0, "v5p-0": 1.0}.items()
        assert host["Labels"].items() >= {"ray.io/tpu-slice-name": "v5p-0", "ray.io/tpu-topology": "2x2x2"}.items()
    assert hosts["0"]["Resources"]["TPU-v5p-16-head"] == 1.0
    assert "TPU-v5p-16-head" not in hosts["1"]["Resources"]


def test_a_conversion_by_the_hosts_asks_for_no_tpu(cluster: Nodes, tmp_path: Path) -> None:
    from ray.util.tpu import SlicePlacementGroup

    source = make_source(tmp_path)
    (tmp_path / "run").mkdir()
    make_config(tmp_path / "run", source)
    chips = SlicePlacementGroup("2x2x2", "v5p")
    try:
        ray.get(chips.slice_placement_group.ready(), timeout=60)
        assert (chips.num_hosts, chips.chips_per_host) == (2, 4)
        assert ray.available_resources().get("TPU", 0) == 0
        words = ["run", "run/config.toml", "--executor", "ray", "--set", "workers.count=0", "--address", cluster.address]
        done = subprocess.run(
            [sys.executable, "-m", "shardconv", *words],
            env={**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(HERE.parent)},
            cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    finally:
        chips.shutdown()
    report = json.loads((tmp_path / "run" / "out.shardconv" / "report.json").read_text())
    assert report["check"]["equal"] and report["executor"] == f"Ray on {cluster.address}"
    assert sorted(map(len, restored(tmp_path / "run" / "out").values())) == sorted(map(len, stored(source).values()))
