"""A conversion on a Ray cluster whose nodes have addresses of their own, in network namespaces; the link of one is cut, another node joins.

    python scripts/clusters/namespaces.py WORK [--default-health-checks]

Needs root and `ip netns`. A bridge `scbr` and namespaces `sc0` to `sc3` are made and removed again. The head, without CPUs, and the driver
are in sc0; sc1 and sc2 work. While sc2 has a unit its link is taken down: nobody is told that the node is gone, its worker goes on with
the unit on the shared disk, and Ray notices when health checks fail. sc3 joins at the same moment. In the end the checkpoint is compared
with that of a run in one process.

Ray waits a minute by default before it gives such a node up; here it is told to wait for three seconds, unless the defaults are asked for.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conversions import make_config, make_source, restored  # noqa: E402
from ray_nodes import QUICK, Nodes, nodes, processes  # noqa: E402
from slow_units import holding  # noqa: E402

from shardconv.config import RunOptions  # noqa: E402
from shardconv.conversion import run  # noqa: E402

BRIDGE = "scbr"
NET = "10.231.8"
HOSTS = 4


def ip(*words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words], check=check, capture_output=not check)


@contextmanager
def namespaces() -> Iterator[None]:
    """A bridge, and namespaces on it that know themselves by name."""
    remove()
    ip("link", "add", BRIDGE, "type", "bridge")
    ip("link", "set", BRIDGE, "up")
    for n in range(HOSTS):
        ip("netns", "add", f"sc{n}")
        ip("link", "add", f"scv{n}", "type", "veth", "peer", "name", "eth0", "netns", f"sc{n}")
        ip("link", "set", f"scv{n}", "master", BRIDGE, "up")
        ip("-n", f"sc{n}", "addr", "add", f"{address(n)}/24", "dev", "eth0")
        ip("-n", f"sc{n}", "link", "set", "eth0", "up")
        ip("-n", f"sc{n}", "link", "set", "lo", "up")
    try:
        yield
    finally:
        remove()


def remove() -> None:
    for n in range(HOSTS):
        ip("netns", "del", f"sc{n}", check=False)
        ip("link", "del", f"scv{n}", check=False)
    ip("link", "del", BRIDGE, check=False)


def address(n: int) -> str:
    return f"{NET}.{n + 1}"


def inside(n: int) -> tuple[str, ...]:
    """Before a command that shall run in a namespace, on a host of that name."""
    return ("ip", "netns", "exec", f"sc{n}", "unshare", "--uts", "sh", "-c", f'hostname sc{n}; exec "$@"', "sh")


def wait_for_unit(work: Path, node: "subprocess.Popen[bytes]", running: "subprocess.Popen[bytes]") -> None:
    """Until a process of the node has been given a unit that waits (`slow_units`)."""
    while not holding(work) & {process.pid for process in processes(node)}:
        if running.poll() is not None:
            raise SystemExit((work / "events").read_text())
        time.sleep(0.1)


def convert(cluster: Nodes, work: Path, source: Path) -> list[dict[str, object]]:
    """The events of the disturbed run, and when the link was cut and the fourth node there."""
    cluster.start("--num-cpus=0", host=address(0), prefix=inside(0))
    _, cut_off = (cluster.start("--num-cpus=1", host=address(n), prefix=inside(n)) for n in (1, 2))
    make_config(work, source)
    command = [sys.executable, str(ROOT / "tests" / "slow_command.py"), "run", str(work / "config.toml")]
    options = ["--executor", "ray", "--set", "workers.count=0", "--address", cluster.address, "--json-logs"]
    events = work / "events"
    with events.open("wb") as out:
        running = subprocess.Popen([*inside(0), *command, *options], env={**os.environ, **cluster.environment}, stderr=out)
    (work / "hold").touch()
    wait_for_unit(work, cut_off, running)
    cut = time.time()
    ip("link", "set", "scv2", "down")
    added = cluster.start("--num-cpus=1", host=address(3), prefix=inside(3))
    joined = time.time()
    wait_for_unit(work, added, running)
    busy = time.time()
    while '"retried"' not in events.read_text():  # the unit that was cut off is not finished meanwhile
        time.sleep(0.1)
    (work / "hold").unlink()
    code = running.wait()
    lines = events.read_text().splitlines()
    foreign = [line for line in lines if not line.startswith("{")]
    print(*foreign, sep="\n")
    if code:
        raise SystemExit(f"the run ended with code {code}: {lines[-1]}")
    print(f"{len(foreign)} lines of stderr are not shardconv's")
    told: list[dict[str, object]] = [json.loads(line) for line in lines if line.startswith("{")]
    return [*told, {"event": "cut", "time": cut}, {"event": "joined", "time": joined}, {"event": "busy", "time": busy}]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--default-health-checks", action="store_true")
    chosen = parser.parse_args()
    work: Path = chosen.work.resolve()
    for folder in (work / "whole", work / "disturbed"):
        folder.mkdir(parents=True)
    source = make_source(work)
    run(make_config(work / "whole", source), RunOptions(restart=False, overwrite=False, verbosity=-1, json_logs=False))
    with namespaces(), nodes(address(0)) as cluster:
        if chosen.default_health_checks:
            cluster.environment = {name: value for name, value in cluster.environment.items() if name not in QUICK}
        events = convert(cluster, work / "disturbed", source)
    at = {str(event["event"]): float(str(event["time"])) for event in reversed(events)}  # the first of each kind
    workers = {(event["host"], event["pid"]) for event in events if event["event"] == "finished"}
    if restored(work / "disturbed" / "out") != restored(work / "whole" / "out"):
        raise SystemExit("the checkpoints differ")
    noticed, used = at["retried"] - at["cut"], at["busy"] - at["joined"]
    print(f"equal checkpoints; {len(workers)} workers")
    print(f"the cut was noticed after {noticed:.1f} s; the node that joined had a unit after {used:.1f} s")
    report = json.loads((work / "disturbed" / "out.shardconv" / "report.json").read_text())
    print(f"{report['units']}; stages {report['stages']}")


if __name__ == "__main__":
    main()
