"""The files of `launch/`, as far as they can be tried without what they are for: KubeRay's own schemas, Ray's own validator, shellcheck.

Nothing here runs Kubernetes, SLURM or gcloud; `launch/README.md` says what has not been run.
"""

import copy
import math
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from kuberay_schemas import schema_of
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
COMMAND = "shardconv run configs/llama70b.toml"
MANIFESTS = sorted(path.name for path in LAUNCH.glob("*.yaml") if "apiVersion: ray.io/v1" in path.read_text())
SCRIPTS = sorted(path.name for path in LAUNCH.iterdir() if path.read_text().startswith("#!"))
RAY = next(r for r in map(Requirement, tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]) if r.name == "ray")


def manifest(name: str) -> dict[str, Any]:
    found = yaml.safe_load((LAUNCH / name).read_text())
    assert isinstance(found, dict)
    return found


def cluster_of(found: dict[str, Any]) -> dict[str, Any]:
    """The cluster's spec in a manifest of either kind."""
    spec = found["spec"]["rayClusterSpec"] if found["kind"] == "RayJob" else found["spec"]
    assert isinstance(spec, dict)
    return spec


def validate(found: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(schema_of(found["kind"])).validate(found)


def groups(found: dict[str, Any]) -> list[dict[str, Any]]:
    spec = cluster_of(found)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def containers(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for group in groups(found):
        yield from group["template"]["spec"]["containers"]


def test_these_are_the_files() -> None:
    assert MANIFESTS == ["gke-tpu-raycluster.yaml", "gke-tpu-rayjob.yaml", "gpu-rayjob.yaml"]
    assert SCRIPTS == ["slurm.sbatch", "tpu-vm.sh"]
    others = {"Dockerfile", "README.md", "ray-up.yaml"}
    assert {path.name for path in LAUNCH.iterdir()} == {*MANIFESTS, *SCRIPTS, *others}
    readme = (LAUNCH / "README.md").read_text()
    assert all(f"({path.name})" in readme for path in LAUNCH.iterdir() if path.name != "README.md")


@pytest.mark.parametrize("name", [*MANIFESTS, *SCRIPTS, "ray-up.yaml"])
def test_each_has_the_one_command_and_says_who_may_talk_to_its_ray(name: str) -> None:
    text = (LAUNCH / name).read_text()
    assert COMMAND in text
    assert (ROOT / COMMAND.split()[-1]).exists()
    assert "RAY_AUTH_MODE" in text


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_is_what_kuberay_takes(name: str) -> None:
    found = manifest(name)
    validate(found)
    spec = cluster_of(found)
    assert spec["authOptions"] == {"mode": "token"}
    for container in containers(found):
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert all(mount["name"] == "work" for mount in container["volumeMounts"])
    for group in groups(found):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        assert [volume["name"] for volume in group["template"]["spec"]["volumes"]] == ["work"]


def misspelt(found: dict[str, Any]) -> None:
    cluster_of(found)["workerGroupSpecs"][0]["numHosts"] = 8


def in_the_wrong_place(found: dict[str, Any]) -> None:
    cluster_of(found)["headGroupSpec"]["template"]["spec"]["workingDir"] = "/work"


def a_number_for_a_word(found: dict[str, Any]) -> None:
    cluster_of(found)["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0


def without_a_name(found: dict[str, Any]) -> None:
    del cluster_of(found)["workerGroupSpecs"][0]["groupName"]


def another_mode(found: dict[str, Any]) -> None:
    cluster_of(found)["authOptions"]["mode"] = "password"


def deep_in_a_container(found: dict[str, Any]) -> None:
    next(containers(found))["volumeMounts"][0]["mountpath"] = "/work"


@pytest.mark.parametrize("name", MANIFESTS)
@pytest.mark.parametrize("spoil", [misspelt, in_the_wrong_place, a_number_for_a_word, without_a_name, another_mode, deep_in_a_container])
def test_a_mistake_in_a_manifest_is_refused(name: str, spoil: Callable[[dict[str, Any]], None]) -> None:
    found = copy.deepcopy(manifest(name))
    spoil(found)
    with pytest.raises(jsonschema.ValidationError):
        validate(found)


def test_the_two_manifests_of_a_slice_have_one_cluster() -> None:
    assert cluster_of(manifest("gke-tpu-raycluster.yaml")) == cluster_of(manifest("gke-tpu-rayjob.yaml"))


def test_the_slice_is_whole_and_has_the_devices_of_the_mesh() -> None:
    (group,) = cluster_of(manifest("gke-tpu-rayjob.yaml"))["workerGroupSpecs"]
    pod = group["template"]["spec"]
    (container,) = pod["containers"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(map(int, topology.split("x")))
    assert group["numOfHosts"] * int(container["resources"]["limits"]["google.com/tpu"]) == chips
    assert {entry["name"]: entry["value"] for entry in container["env"]} == {"TPU_ACCELERATOR_TYPE": "v5p-64", "TPU_TOPOLOGY": topology}
    config = tomllib.loads((ROOT / "configs" / "llama70b.toml").read_text())
    assert math.prod(config["mesh"]["axes"].values()) == chips
    tpu = pytest.importorskip("ray._private.accelerators.tpu")
    assert tpu.infer_tpu_pod_type_from_topology(topology, "TPU-V5P") == "v5p-64"
    assert tpu.get_num_chips_from_topology(topology) == chips


@pytest.mark.parametrize("name", [*MANIFESTS, "ray-up.yaml", "Dockerfile"])
def test_each_rayversion_is_one_that_is_allowed(name: str) -> None:
    text = (LAUNCH / name).read_text()
    versions = re.findall(r"rayVersion: \"(.+?)\"|ray==([0-9.]+)|rayproject/ray:([0-9.]+)-", text)
    assert versions
    assert all(RAY.specifier.contains(next(filter(None, version))) for version in versions)
    assert len({next(filter(None, v)) for file in LAUNCH.iterdir() for v in re.findall(r"rayVersion: \"(.+?)\"|rayproject/ray:([0-9.]+)-",
                                                                                         file.read_text())}) == 1  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_sound(name: str) -> None:
    subprocess.run(["bash", "-n", str(LAUNCH / name)], check=True)
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run([shellcheck, str(LAUNCH / name)], check=True)


def tpu_vm(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([str(LAUNCH / "tpu-vm.sh"), *words], capture_output=True, text=True, check=False)


def test_the_script_for_tpu_vms_shows_what_it_would_do() -> None:
    done = tpu_vm("--tpu", "t", "--zone", "z", "--dry-run", "--work", "/mnt/my disk", "--", "--set", "target.dtype=a b")
    steps = done.stdout.splitlines()
    assert done.returncode == 0
    assert [re.search(r"scp|--worker=\S+", step)[0] for step in steps] == ["scp", "--worker=0", "--worker=1", "--worker=0", "--worker=all"]  # type: ignore[index]
    said = [subprocess.run(["bash", "-c", f"printf '%s\n' {step}"], capture_output=True, text=True, check=True).stdout for step in steps]
    assert "ray start --head --port=6379 --num-cpus=64" in said[1]
    assert "ray start --address=HOST0:6379 --num-cpus=64" in said[2]
    assert f"cd /mnt/my\\ disk && {COMMAND} --address HOST0:6379 --set target.dtype=a\\ b\n" in said[3]
    assert "ray stop" in said[4]
    assert all("RAY_AUTH_MODE=token" in step for step in said[1:])
    assert "ray stop" not in tpu_vm("--tpu", "t", "--zone", "z", "--dry-run", "--keep").stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--zone", "z"], "tpu-vm.sh: --tpu and --zone are needed; --help shows all options\n"),
        (["--tpu"], "tpu-vm.sh: --tpu needs a value\n"),
        (["--zoom", "z"], "tpu-vm.sh: --zoom is not an option; --help shows them\n"),
    ],
)
def test_a_mistake_in_its_options_is_said(words: list[str], said: str) -> None:
    done = tpu_vm(*words)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


def test_its_help_names_every_option() -> None:
    text = (LAUNCH / "tpu-vm.sh").read_text()
    done = tpu_vm("--help")
    assert done.returncode == 0
    assert set(re.findall(r"(--[a-z-]+) [|)]", text.split("while", 1)[1])) <= set(re.findall(r"--[a-z-]+", done.stdout))


def test_ray_takes_the_cluster_file() -> None:
    util = pytest.importorskip("ray.autoscaler._private.util")
    found = manifest("ray-up.yaml")
    util.validate_config(util.prepare_config(copy.deepcopy(found)))
    for spoil in ({"head_start_ray_command": []}, {"idle_timeout_minutes": "three"}):
        with pytest.raises(jsonschema.ValidationError):
            util.validate_config(util.prepare_config({**copy.deepcopy(found), **spoil}))
    assert all("RAY_AUTH_MODE=token" in found[key][-1] for key in ("head_start_ray_commands", "worker_start_ray_commands"))
