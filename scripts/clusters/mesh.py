"""A run on a mesh whose processes are on hosts with addresses of their own, in network namespaces; one host goes, another takes its place.

    python scripts/clusters/mesh.py WORK

Needs root and `ip netns`; see `namespaces`. The driver and a head without CPUs are in sc0; actors on sc1 and sc2 share a mesh of four CPU
devices. First no host's name leads to its address, which is refused before anything is read. Then sc3 joins, and sc2 is killed, all of it
at once, when the first window is written: the group is started again on sc1 and sc3. In the end the checkpoint is compared with that of a
run that streams.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conversions import make_config, make_source, restored  # noqa: E402
from namespaces import HOSTS, address, inside, namespaces  # noqa: E402
from ray_nodes import Nodes, nodes  # noqa: E402

from shardconv.config import RunOptions  # noqa: E402
from shardconv.conversion import run  # noqa: E402

MESH = (
    "mesh.axes.fsdp=2", "mesh.axes.tensor=2", 'mesh.rules.embed="fsdp"', 'mesh.rules.vocab="tensor"', 'mesh.rules.mlp="tensor"',
    "mesh.processes=2", 'workers.memory_budget="160KiB"', 'output.chunk_bytes="4KiB"',
)  # fmt: skip
HOSTS_FILES = Path("/etc/netns")


@contextmanager
def names() -> Iterator[None]:
    """Hosts files by which each namespace finds the others by name; `ip netns exec` mounts them."""
    for n in range(HOSTS):
        folder = HOSTS_FILES / f"sc{n}"
        folder.mkdir(parents=True)
        lines = ["127.0.0.1 localhost", *(f"{address(host)} sc{host}" for host in range(HOSTS))]
        (folder / "hosts").write_text("\n".join(lines) + "\n")
    try:
        yield
    finally:
        for n in range(HOSTS):
            shutil.rmtree(HOSTS_FILES / f"sc{n}")


def convert(cluster: Nodes, work: Path, source: Path, placement: str) -> subprocess.Popen[bytes]:
    """The command in sc0, whose events go to WORK/events."""
    make_config(work, source)
    options = [word for said in MESH for word in ("--set", said)]
    command = [sys.executable, "-m", "shardconv", "run", str(work / "config.toml"), "--placement", placement, *options]
    environment = {**os.environ, **cluster.environment, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    with (work / "events").open("wb") as out:
        more = ["--executor", "ray", "--address", cluster.address, "--json-logs", "--restart"]
        return subprocess.Popen([*inside(0), *command, *more], env=environment, stderr=out, stdout=out)


def events(work: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (work / "events").read_text().splitlines() if line.startswith("{")]


def without_names(work: Path, source: Path) -> None:
    with namespaces(), nodes(address(0)) as cluster:
        cluster.start("--num-cpus=0", host=address(0), prefix=inside(0))
        for n in (1, 2):
            cluster.start("--num-cpus=1", host=address(n), prefix=inside(n))
        code = convert(cluster, work, source, "mesh-device").wait()
        print(f"hosts without names: code {code}\n{events(work)[-1]['message']}")


def with_names(work: Path, source: Path, placement: str) -> None:
    with names(), namespaces(), nodes(address(0)) as cluster:
        cluster.start("--num-cpus=0", host=address(0), prefix=inside(0))
        _, lost = (cluster.start("--num-cpus=1", host=address(n), prefix=inside(n)) for n in (1, 2))
        begun = time.monotonic()
        running = convert(cluster, work, source, placement)
        while not any(event["event"] == "finished" for event in events(work)):
            if running.poll() is not None:
                raise SystemExit((work / "events").read_text())
            time.sleep(0.02)
        cluster.kill(lost)
        cluster.start("--num-cpus=1", host=address(3), prefix=inside(3))
        code = running.wait()
        if code:
            raise SystemExit(f"the run ended with code {code}: {(work / 'events').read_text()}")
        hosts = sorted({str(event["host"]) for event in events(work) if event["event"] == "finished"})
        retried = [event for event in events(work) if event["event"] == "retried"]
        print(f"{placement}: {time.monotonic() - begun:.1f} s, {len(retried)} start again, units by {', '.join(hosts)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("work", type=Path)
    work: Path = parser.parse_args().work.resolve()
    source_folder = work / "model"
    source_folder.mkdir(parents=True)
    source = make_source(source_folder)
    (work / "whole").mkdir()
    run(make_config(work / "whole", source), RunOptions(restart=False, overwrite=False, verbosity=-1, json_logs=False))
    (work / "unnamed").mkdir()
    without_names(work / "unnamed", source)
    for placement in ("mesh-host", "mesh-device"):
        (work / placement).mkdir()
        with_names(work / placement, source, placement)
        if restored(work / placement / "out") != restored(work / "whole" / "out"):
            raise SystemExit("the checkpoints differ")
    print("equal checkpoints")


if __name__ == "__main__":
    main()
