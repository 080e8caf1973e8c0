"""Runs that place arrays on a mesh and write them from there: the same checkpoint, whoever shares the mesh and whoever dies."""

import dataclasses
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conversions import MODEL as LLAMA
from conversions import Conversion, interrupt_after, make_config, make_source, plan_finely, restored
from safetensors.numpy import load_file
from waiting import alive

from shardconv.errors import ConfigError, RunError
from shardconv.ledger import Ledger
from shardconv.plan import Plan
from shardconv.planning import plan_from_config
from shardconv.run import Finished, Patience, Ready, Restarted, Told, Waiting, driver, gang
from shardconv.run.job import Job, Place, state_path
from shardconv.run.local_group import LocalGroup
from shardconv.run.member import Hello
from shardconv.synth import synthesise

RULES = ('mesh.rules.vocab="tensor"', 'mesh.rules.embed="fsdp"', 'mesh.rules.heads="tensor"', 'mesh.rules.mlp="tensor"')
TWO = ("mesh.axes.fsdp=2", "mesh.axes.tensor=2", *RULES, "mesh.processes=2", 'mesh.placement="mesh-host"')
WINDOWS = ('workers.memory_budget="160KiB"', 'output.chunk_bytes="4KiB"')


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory, source: Path) -> dict[str, bytes]:
    """The arrays of a conversion that streams."""
    conversion = conversion_of(tmp_path_factory.mktemp("streamed"), source)
    conversion.drive()
    return restored(conversion.out)


def conversion_of(root: Path, source: Path, *overrides: str) -> Conversion:
    config = make_config(root, source, *overrides)
    return Conversion(root, config, plan_from_config(config))


def members() -> list[psutil.Process]:
    """The processes that share the mesh."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if child.status() != psutil.STATUS_ZOMBIE and "shardconv.run.member:call" in child.cmdline()]


def strike(number: signal.Signals) -> Callable[[Told], None]:
    """Send a signal to one of the processes when the first unit is finished."""
    struck = []

    def on(told: Told) -> None:
        if isinstance(told, Finished) and not struck:
            struck.append(members()[-1])
            struck[0].send_signal(number)

    return on


MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 1000,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
EXPERTS = ("mesh.axes.expert=2", "mesh.axes.stage=2", "mesh.axes.fsdp=2", 'mesh.rules.experts="expert"', 'mesh.rules.layers="stage"')


@pytest.mark.parametrize("placement", ["mesh-host", "mesh-device"])
@pytest.mark.parametrize(
    ("processes", "axes"),
    [
        (1, ("mesh.axes.fsdp=4", 'mesh.rules.embed="fsdp"')),
        (2, ("mesh.axes.data=2", "mesh.axes.tensor=2", 'mesh.rules.mlp="tensor"', 'mesh.rules.vocab="tensor"')),
        (2, (*EXPERTS, 'mesh.rules.embed="fsdp"')),
        (4, (*EXPERTS, 'mesh.rules.vocab=["fsdp", "expert"]')),
    ],
    ids=["one axis", "a replica", "experts and stages", "four processes"],
)
@pytest.mark.parametrize("layout", ["flat", "maxtext"])
def test_the_arrays_are_those_of_a_conversion_that_streams(
    tmp_path: Path, processes: int, axes: tuple[str, ...], placement: str, layout: str
) -> None:
    (tmp_path / "model.json").write_text(json.dumps(MIXTRAL))
    synthesise(str(tmp_path / "model.json"), str(tmp_path / "source"), sparse=False, seed=1, dtype="bfloat16", shard_bytes=500_000)
    checkpoints = []
    for name, more in (("streamed", ()), ("placed", (*axes, f"mesh.processes={processes}", f'mesh.placement="{placement}"'))):
        (tmp_path / name).mkdir()
        scanned = ("target.scan_layers=true", f'target.layout="{layout}"', "target.dtype=float32")
        conversion = conversion_of(tmp_path / name, tmp_path / "source", *scanned, *more)
        outcome = conversion.drive()
        checkpoints.append(restored(Path(outcome.checkpoint) / ("items" if layout == "maxtext" else "")))
    assert checkpoints[0] == checkpoints[1]
    written = sum(int(str(record["bytes_written"])) for record in outcome.records.values())
    assert conversion.plan.target_bytes <= written < 1.1 * conversion.plan.target_bytes + 400_000  # replicas once
    if placement == "mesh-device":
        assert sum(int(str(record["bytes_read"])) for record in outcome.records.values()) == sum(
            tensor.nbytes for path in (tmp_path / "source").glob("*.safetensors") for tensor in load_file(path).values()
        )
    assert members() == []


def test_a_mesh_plan_is_done_by_workers_that_stream_to_the_same_bytes(tmp_path: Path, source: Path) -> None:
    checkpoints = []
    for name in ("placed", "streamed"):
        (tmp_path / name).mkdir()
        conversion = conversion_of(tmp_path / name, source, *TWO)
        if name == "streamed":
            conversion.plan = dataclasses.replace(conversion.plan, windows=())
        conversion.drive()
        about = json.loads((conversion.out / "_METADATA").read_text())["custom_metadata"]["shardconv"]
        checkpoints.append((restored(conversion.out), about["checksums"], about["partition_specs"]))
    assert checkpoints[0] == checkpoints[1]


def test_windows_are_done_one_after_another_and_not_again(tmp_path: Path, source: Path, streamed: dict[str, bytes]) -> None:
    conversion = conversion_of(tmp_path, source, *TWO, *WINDOWS)
    assert len(conversion.plan.windows) > 2
    first = len(conversion.plan.windows[0].units)
    with pytest.raises(RunError, match="interrupted"):
        conversion.drive(interrupt_after(first))
    outcome = conversion.drive()
    assert sorted(conversion.finished()) == list(range(first, len(conversion.plan.units)))
    assert restored(conversion.out) == streamed
    assert sum(int(str(record["bytes_read"])) for record in outcome.records.values()) < 2.1 * conversion.plan.bytes_read


def test_a_process_that_dies_costs_one_start_and_no_finished_unit(tmp_path: Path, source: Path, streamed: dict[str, bytes]) -> None:
    conversion = conversion_of(tmp_path, source, *TWO, *WINDOWS)
    conversion.drive(strike(signal.SIGKILL))
    retried = [told for told in conversion.told if isinstance(told, Restarted)]
    assert len(retried) == 1
    assert retried[0].error.startswith("process ")
    assert "was killed by SIGKILL" in retried[0].error
    assert sum(isinstance(told, Ready) for told in conversion.told) == 1
    assert sorted(conversion.finished()) == list(range(len(conversion.plan.units)))
    assert restored(conversion.out) == streamed


def test_processes_that_die_too_often_are_a_report_and_the_next_run_goes_on(
    tmp_path: Path, source: Path, streamed: dict[str, bytes]
) -> None:
    conversion = conversion_of(tmp_path, source, *TWO, *WINDOWS, "workers.max_restarts=0")
    with pytest.raises(RunError) as caught:
        conversion.drive(strike(signal.SIGKILL))
    lines = str(caught.value).splitlines()
    assert lines[0] == "the processes on the mesh died once (1 problem):"
    assert lines[1].startswith("  last: process ")
    assert lines[-1] == "      run the same command again to go on from the finished units; -v shows what the processes said"
    assert members() == []
    finished = len(conversion.ledger.finished())
    assert finished
    conversion.drive()
    assert len(conversion.finished()) == len(conversion.plan.units) - finished
    assert restored(conversion.out) == streamed


def test_a_process_that_hangs_is_named_and_all_are_started_again(
    tmp_path: Path, source: Path, streamed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "PATIENCE", Patience(name_after=1.0, give_up_after=8.0))
    conversion = conversion_of(tmp_path, source, *TWO, *WINDOWS)
    conversion.drive(strike(signal.SIGSTOP))
    assert any(isinstance(told, Waiting) for told in conversion.told)
    (retried,) = (told for told in conversion.told if isinstance(told, Restarted))
    assert retried.error.startswith("no sign of life for ")
    assert members() == []
    assert restored(conversion.out) == streamed


def test_a_vocabulary_that_the_mesh_does_not_divide_is_refused_or_padded(tmp_path: Path, source: Path) -> None:
    three = ("mesh.axes.tensor=3", 'mesh.rules.vocab="tensor"')
    with pytest.raises(ConfigError) as caught:
        conversion_of(tmp_path, source, *three, 'mesh.placement="mesh"')
    assert str(caught.value) == (
        "the mesh does not divide the arrays (1 problem):\n"
        "  vocab is 1000 in 2 arrays, which 3 shards along tensor do not divide\n"
        '      set mesh.axes.tensor to a divisor of 1000, or mesh.rules.vocab = "", or target.vocab_size = 1002 to pad it'
    )
    checkpoints = []
    for name, more in (("streamed", ()), ("placed", ('mesh.placement="mesh"',))):
        (tmp_path / name).mkdir()
        conversion = conversion_of(tmp_path / name, source, *three, "target.vocab_size=1002", *more)
        conversion.drive()
        checkpoints.append(restored(conversion.out))
    assert checkpoints[0] == checkpoints[1]
    assert len(checkpoints[1]["embed"]) == 1002 * 64 * 2
    assert not any(checkpoints[1]["embed"][1000 * 64 * 2 :])


# ------------------------------------------------------------------------------------------------------------ coming together


@pytest.fixture
def begun(tmp_path: Path, source: Path) -> tuple[str, Plan]:
    """A ledger with a plan for two processes, and the plan."""
    config = make_config(tmp_path, source, *TWO)
    plan, ledger = plan_from_config(config), Ledger(state_path(str(tmp_path / "out")))
    ledger.create()
    from shardconv.conversion import RunOptions, request_of
    from shardconv.run.preflight import header_of

    request = request_of(config, RunOptions(restart=False, overwrite=False, verbosity=0, json_logs=False))
    job = Job(Place(request.output, None, None, aside=False), request.store, {})
    ledger.begin(header_of(request, plan), job.to_data(), plan.to_json())
    return ledger.state, plan


class Altered(LocalGroup):
    """A group one of whose processes is asked something else."""

    alter: Callable[["Altered", int, str, tuple[object, ...]], tuple[object, ...]]

    def ask(self, member: int, function: str, *arguments: object) -> None:
        super().ask(member, function, *type(self).alter(self, member, function, arguments))


@pytest.fixture
def group(begun: tuple[str, Plan]) -> Iterator[Altered]:
    altered = Altered(begun[0], 2, verbose=False)
    yield altered
    altered.stop()


def test_too_few_devices_are_a_report_before_anything_is_read(begun: tuple[str, Plan], group: Altered) -> None:
    def one_device(self: Altered, member: int, function: str, arguments: tuple[object, ...]) -> tuple[object, ...]:
        return (*arguments[:4], gang.environment_of("cpu", 1), *arguments[5:]) if function == "join" else arguments

    Altered.alter = one_device
    with pytest.raises(ConfigError) as caught:
        gang.meet(group, *begun, "cpu")
    lines = str(caught.value).splitlines()
    pids = [child.pid for child in group._children]
    host = os.uname().nodename
    assert lines == [
        "the devices are not those of the mesh (3 problems):",
        "  the mesh has 4 cpu devices (fsdp 2 x tensor 2), 2 for each of 2 processes",
        f"  pid {pids[0]} on {host} has 1 (cpu)",
        f"  pid {pids[1]} on {host} has 1 (cpu)",
        "      set mesh.axes to what there is, mesh.processes so that each has 4 / processes devices, or mesh.platform",
    ]


def test_devices_of_another_kind_are_refused(begun: tuple[str, Plan], group: Altered) -> None:
    def on_cpus(self: Altered, member: int, function: str, arguments: tuple[object, ...]) -> tuple[object, ...]:
        return (*arguments[:4], gang.environment_of("cpu", 2), *arguments[5:]) if function == "join" else arguments

    Altered.alter = on_cpus
    with pytest.raises(ConfigError) as caught:
        gang.meet(group, *begun, "gpu")
    lines = str(caught.value).splitlines()
    assert lines[1] == "  the mesh has 4 gpu devices (fsdp 2 x tensor 2), 2 for each of 2 processes"
    assert lines[2] == f"  pid {group._children[0].pid} on {os.uname().nodename} has 2 (cpu)"


@pytest.mark.parametrize(("at", "said"), [("hello", "has not started"), ("join", "has not joined the others at 127.0.0.1:")])
def test_a_process_that_does_not_come_is_named(
    begun: tuple[str, Plan], group: Altered, monkeypatch: pytest.MonkeyPatch, at: str, said: str
) -> None:
    monkeypatch.setattr(gang, "START", 10.0)
    monkeypatch.setattr(gang, "MEET", 5.0)
    monkeypatch.setattr(gang, "GRACE", 25.0)

    def stopped(self: Altered, member: int, function: str, arguments: tuple[object, ...]) -> tuple[object, ...]:
        if function == at and member == 1:
            os.kill(self._children[1].pid, signal.SIGSTOP)
        return arguments

    Altered.alter = stopped
    with pytest.raises(RunError) as caught:
        gang.meet(group, *begun, "cpu")
    assert str(caught.value).startswith("the processes did not come together (1 problem):\n  process 1 of 2 ")
    assert said in str(caught.value)


def test_hosts_whose_names_lead_nowhere_are_named(begun: tuple[str, Plan], group: Altered, monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(self: Altered, timeout: float) -> list[tuple[int, object]]:
        found = LocalGroup.answers(self, timeout)
        told = [(n, one) for n, one in found if isinstance(one, Hello)]
        return [(n, dataclasses.replace(one, address=f"10.0.0.{n}", loopback=n == 1)) for n, one in told]

    Altered.alter = lambda self, member, function, arguments: arguments
    monkeypatch.setattr(Altered, "answers", elsewhere)
    with pytest.raises(RunError) as caught:
        gang.meet(group, *begun, "cpu")
    assert str(caught.value) == (
        "the hosts cannot meet (1 problem):\n"
        f"  the name of {os.uname().nodename} does not lead to the host's own address there\n"
        "      give it that address in /etc/hosts, in place of 127.0.0.1 or 127.0.1.1"
    )


def test_stopping_a_group_ends_its_processes(begun: tuple[str, Plan]) -> None:
    group = LocalGroup(begun[0], 2, verbose=False)
    pids = [child.pid for child in group._children]
    gang.meet(group, *begun, "cpu")
    group.stop()
    assert not any(alive(pid) for pid in pids)


def test_a_finer_plan_has_no_windows(tmp_path: Path, source: Path) -> None:
    assert plan_finely(make_config(tmp_path, source)).windows == ()


@pytest.mark.parametrize("placement", ["mesh-host", "mesh-device"])
def test_memory_is_the_budgets_and_not_the_models(tmp_path: Path, placement: str) -> None:
    peaks = []
    for layers in (1, 12):
        root = tmp_path / str(layers)
        root.mkdir()
        model = {**LLAMA, "hidden_size": 512, "intermediate_size": 2048, "vocab_size": 8000, "num_hidden_layers": layers}
        (root / "model.json").write_text(json.dumps(model))
        synthesise(str(root / "model.json"), str(root / "source"), sparse=False, seed=1, dtype="bfloat16", shard_bytes=50_000_000)
        small = ('workers.memory_budget="24MiB"', 'output.chunk_bytes="1MiB"', f'mesh.placement="{placement}"', "mesh.processes=1")
        conversion = conversion_of(root, root / "source", *TWO, *small)
        outcome = conversion.drive()
        peaks.append(max(int(str(record["peak_rss"])) for record in outcome.records.values()))
        assert conversion.plan.peak_bytes <= 24 << 20
    assert conversion.plan.target_bytes > 4 * (24 << 20)
    assert peaks[1] - peaks[0] < 24 << 20  # the first has not filled its budget, and jax has an arena of its own
