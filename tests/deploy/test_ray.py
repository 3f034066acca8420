"""deploy/k8s/ray as kubectl renders it: valid for KubeRay and Kubernetes, restricted, a job that our program takes."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from jsonschema import ValidationError, validate

from foldserve.server.api import launch
from foldserve.server.api.batch import ray_job
from foldserve.server.api.batch.run import NOT_FOR_A_BATCH
from foldserve.server.settings import Environment, Settings
from tests.deploy.files import DEPLOY, rendered
from tests.deploy.kuberay import RAY_JOB
from tests.deploy.pods import check_restricted
from tests.deploy.test_static import PROJECT, values

VERSION = kubernetes_validate.latest_version()


@cache
def objects() -> dict[str, dict[str, Any]]:
    """Of the kustomization, by kind; there is one of each."""
    return {item["kind"]: item for item in rendered(DEPLOY / "k8s" / "ray")}


def pods(job: dict[str, Any]) -> dict[str, Any]:
    """The templates of the head and of each group of workers."""
    cluster = job["spec"]["rayClusterSpec"]
    groups = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"], **groups}


def check(job: dict[str, Any]) -> None:
    """Raises ValidationError if KubeRay or Kubernetes would refuse a RayJob."""
    validate(job, RAY_JOB)
    cluster = job["spec"]["rayClusterSpec"]
    autoscaler = {"name": "autoscaler", "image": "x"} | {
        field: cluster["autoscalerOptions"][field] for field in ("resources", "securityContext")
    }
    for name, template in {**pods(job), "autoscaler": {"spec": {"containers": [autoscaler]}}}.items():
        assert template["spec"]["containers"][0].get("image"), name
        item = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": name}, "template": template}
        kubernetes_validate.validate(item, VERSION, strict=True)
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"], group["groupName"]


def test_objects_fit_the_schemas() -> None:
    assert set(objects()) == {"Namespace", "PersistentVolumeClaim", "NetworkPolicy", "RayJob"}
    for kind, item in objects().items():
        assert item["metadata"].get("namespace", item["metadata"]["name"]) == "foldserve-batch"
        if kind != "RayJob":
            kubernetes_validate.validate(item, VERSION, strict=True)
    check(objects()["RayJob"])


def _cluster(job: dict[str, Any]) -> Any:
    return job["spec"]["rayClusterSpec"]


def _workers(job: dict[str, Any]) -> Any:
    return _cluster(job)["workerGroupSpecs"][0]


def _container(job: dict[str, Any]) -> Any:
    return _workers(job)["template"]["spec"]["containers"][0]


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda job: job["spec"].update(entryPoint="python3"), id="unknown field of the job"),
        pytest.param(lambda job: job["spec"].pop("entrypoint"), id="no entrypoint"),
        pytest.param(lambda job: job["spec"].update(backoffLimit="3"), id="text for a number"),
        pytest.param(lambda job: job["spec"].update(submissionMode="HttpMode"), id="unknown mode"),
        pytest.param(lambda job: _cluster(job).update(enableInTreeAutoscaling="true"), id="text for a boolean"),
        pytest.param(lambda job: _cluster(job).update(rayVersion=2.6), id="number for a version"),
        pytest.param(
            lambda job: _cluster(job)["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
            id="number for a parameter of ray start",
        ),
        pytest.param(lambda job: _cluster(job)["autoscalerOptions"].update(idleSeconds=1), id="unknown field"),
        pytest.param(
            lambda job: _cluster(job)["autoscalerOptions"]["resources"].update(limit={}),
            id="unknown field of resources",
        ),
        pytest.param(lambda job: _workers(job).pop("groupName"), id="no name of a group"),
        pytest.param(lambda job: _workers(job).update(maxReplicas=0), id="fewer at most than at least"),
        pytest.param(lambda job: _container(job).pop("image"), id="no image"),
        pytest.param(lambda job: _container(job).update(volumeMount=[]), id="unknown field of a container"),
        pytest.param(lambda job: _container(job)["ports"].append({"port": 1}), id="unknown field of a port"),
        pytest.param(lambda job: _container(job).update(env={"HF_HOME": "/data"}), id="object for a list"),
    ],
)
def test_a_mistake_is_found(spoil: Callable[[dict[str, Any]], object]) -> None:
    job = deepcopy(objects()["RayJob"])
    _container(job)["ports"] = []
    check(job)
    spoil(job)
    with pytest.raises((ValidationError, kubernetes_validate.ValidationError, AssertionError)):
        check(job)


@pytest.mark.parametrize("name", ["head", "gpu"])
def test_pods_are_restricted(name: str) -> None:
    pod = pods(objects()["RayJob"])[name]["spec"]
    check_restricted(pod)
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts == {"data": "/data", "shm": "/dev/shm"}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    claim = objects()["PersistentVolumeClaim"]
    assert volumes["data"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_workers_have_a_gpu_each_and_as_many_as_there_are_engines() -> None:
    job = objects()["RayJob"]
    limits = _container(job)["resources"]["limits"]
    args, _ = ray_job.read_arguments(shlex.split(job["spec"]["entrypoint"])[3:])
    assert limits["nvidia.com/gpu"] == args.gpus == 1
    assert args.actors == [_workers(job)["minReplicas"], _workers(job)["maxReplicas"]]
    assert "nvidia.com/gpu" not in pods(job)["head"]["spec"]["containers"][0]["resources"]["limits"]
    assert _cluster(job)["enableInTreeAutoscaling"] is True


def test_the_job_is_a_program_of_ours_whose_options_vllm_takes() -> None:
    python, dash_m, module, *argv = shlex.split(objects()["RayJob"]["spec"]["entrypoint"])
    assert (python, dash_m, module) == ("python3", "-m", ray_job.__name__)
    args, options = ray_job.read_arguments(argv)
    assert all(path.startswith("/data/") for path in (args.requests, args.results, args.checkpoints))
    parsed = launch.serve_args(
        [args.model, *options],
        Settings(),
        Environment.read(),
        Path(args.model),
        command="batch",
        refused=NOT_FOR_A_BATCH,
    )
    assert (parsed.model_tag, parsed.max_model_len) == ("llava-hf/llava-1.5-7b-hf", 4096)


def test_image_and_cluster_have_the_same_ray() -> None:
    defaults = dict(value.split("=") for value in values("deploy/Dockerfile.ray", "ARG") if "=" in value)
    assert _cluster(objects()["RayJob"])["rayVersion"] == defaults["RAY_VERSION"]
    assert defaults["FOLDSERVE_VERSION"] == PROJECT["version"]
    tag = f"foldserve-ray:{PROJECT['version']}"
    assert {pod["spec"]["containers"][0]["image"] for pod in pods(objects()["RayJob"]).values()} == {tag}
    assert values("deploy/Dockerfile.ray", "USER")[-1] == "2000:0"


def test_nobody_outside_reaches_the_cluster() -> None:
    """Ray's ports run any code that comes."""
    policy = objects()["NetworkPolicy"]["spec"]
    assert policy["podSelector"] == {} and set(policy["policyTypes"]) == {"Ingress", "Egress"}
    inside, operator = policy["ingress"]
    assert inside == {"from": [{"podSelector": {}}]}
    assert operator["from"][0]["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "kuberay-operator"}
    ports = {port["name"] for port in pods(objects()["RayJob"])["head"]["spec"]["containers"][0]["ports"]}
    assert [port["port"] for port in operator["ports"]] == ["dashboard"] and "dashboard" in ports
