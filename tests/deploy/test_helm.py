"""The chart as Helm's own engine renders it: the same objects as kustomize's, and values that do what they say."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml

from tests.deploy.files import CUSTOM, DEPLOY, OVERLAYS, ROOT, arguments, manifests

CHART = DEPLOY / "helm"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
DIGEST = f"sha256:{'0123456789abcdef' * 4}"


@cache
def example(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((CHART / "examples" / f"{name}.yaml").read_text())
    return values


def chart_objects(
    values: Mapping[str, Any], chart: Path = CHART, namespace: str = "foldserve"
) -> dict[tuple[str, str], dict[str, Any]]:
    """The objects of a release, by kind and name."""
    with helm_python.Chart.load(chart) as loaded:
        files = loaded.render(dict(values), name="mine", namespace=namespace)
    texts = [text for path, text in files.items() if not path.endswith("NOTES.txt")]
    return by_name([item for text in texts for item in yaml.safe_load_all(text) if item])


def by_name(items: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    named = {(item["kind"], item["metadata"]["name"]): item for item in items}
    assert len(named) == len(items)
    return named


def kustomize_objects(overlay: str) -> dict[tuple[str, str], dict[str, Any]]:
    """An overlay's objects but its namespace, and those that `prometheus-rule.sh` adds where there is monitoring."""
    found = by_name(list(manifests(overlay)))
    if any(kind == "ServiceMonitor" for kind, _ in found):
        script = DEPLOY / "k8s" / "prometheus-rule.sh"
        printed = subprocess.run([script], capture_output=True, text=True, check=True).stdout
        found |= by_name([yaml.safe_load(printed)])
    del found["Namespace", "foldserve"]
    return found


def split_labels(item: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    metadata = {name: value for name, value in item["metadata"].items() if name != "labels"}
    return item["metadata"].get("labels", {}), {**item, "metadata": metadata}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_example_gives_the_objects_of_its_overlay(overlay: str) -> None:
    ours, theirs = chart_objects(example(overlay)), kustomize_objects(overlay)
    assert set(ours) == set(theirs)
    for key, item in theirs.items():
        (our_labels, ours_without), (labels, without) = split_labels(ours[key]), split_labels(item)
        assert ours_without == without, key
        assert labels.items() <= our_labels.items(), key


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_objects_fit_the_schemas(overlay: str) -> None:
    version = kubernetes_validate.latest_version()
    for item in chart_objects(example(overlay)).values():
        if item["kind"] not in CUSTOM:
            kubernetes_validate.validate(item, version, strict=True)


def test_helm_finds_nothing_to_mend() -> None:
    for overlay in OVERLAYS:
        findings = helm_python.lint(CHART, values=example(overlay))
        assert [m["error"] for m in findings["messages"]] == ["icon is recommended"], overlay


def test_the_chart_has_the_version_of_the_project() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == VERSION
    assert example("cpu-demo")["image"]["tag"] == f"{VERSION}-cpu"


def test_values_reach_the_server() -> None:
    values = {
        "maxQueue": 1_000_000,
        "shutdownTimeout": 90,
        "extraArgs": ["--default-reduction=0.5", '--structured={"a": 1}'],
        "env": {"VLLM_LOGGING_LEVEL": "DEBUG", "N": 2},
        "image": {"repository": "registry.example.com/foldserve", "digest": DIGEST},
        "imagePullSecrets": [{"name": "one"}],
        "replicas": 3,
        "gpus": 2,
        "resources": {"limits": {"memory": "64Gi"}},
        "nodeSelector": {"gpu": "h100"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "storage": {"size": "1Ti", "className": "fast"},
        "apiKeys": {"secret": "my-keys"},
    }
    found = chart_objects(values)
    deployment = found["Deployment", "foldserve"]
    kubernetes_validate.validate(deployment, kubernetes_validate.latest_version(), strict=True)
    assert deployment["spec"]["replicas"] == 3
    pod = deployment["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 130
    assert pod["imagePullSecrets"] == values["imagePullSecrets"]
    assert pod["nodeSelector"] == values["nodeSelector"] and pod["tolerations"] == values["tolerations"]
    assert {"name": "api-keys", "secret": {"secretName": "my-keys", "defaultMode": 0o440}} in pod["volumes"]
    (container,) = pod["containers"]
    assert container["image"] == f"registry.example.com/foldserve:{VERSION}@{DIGEST}"
    assert container["resources"]["limits"] == {"memory": "64Gi", "ephemeral-storage": "20Gi", "nvidia.com/gpu": 2}
    assert container["resources"]["requests"]["memory"] == "24Gi"
    assert {"name": "N", "value": "2"} in container["env"]
    assert arguments(container) == [
        "llava-hf/llava-1.5-7b-hf",
        "--max-model-len=4096",
        "--max-queue=1000000",
        "--shutdown-timeout=90",
        "--log-format=json",
        "--default-reduction=0.5",
        '--structured={"a": 1}',
        "--api-keys=/run/foldserve/api-keys.toml",
    ]
    claim = found["PersistentVolumeClaim", "foldserve-models"]["spec"]
    assert claim["storageClassName"] == "fast" and claim["resources"]["requests"]["storage"] == "1Ti"


def test_another_namespace_reaches_all_that_names_it() -> None:
    values = example("replicas") | {
        "monitoring": {"enabled": True, "namespace": "observability"},
        "keda": {"enabled": True, "minReplicas": 3, "prometheus": "http://prometheus.observability:9090"},
    }
    found = chart_objects(values, namespace="vision")
    assert {item["metadata"]["namespace"] for item in found.values()} == {"vision"}
    assert found["RoleBinding", "foldserve-router"]["subjects"][0]["namespace"] == "vision"
    for name in ("foldserve", "foldserve-router"):
        policy = json.dumps(found["NetworkPolicy", name])
        assert '"observability"' in policy and '"monitoring"' not in policy and '"kube-system"' in policy
    scaled = found["ScaledObject", "foldserve"]["spec"]
    assert (scaled["minReplicaCount"], scaled["maxReplicaCount"], scaled["fallback"]["replicas"]) == (3, 8, 3)
    for trigger in scaled["triggers"]:
        assert 'namespace="vision"' in trigger["metadata"]["query"]
        assert trigger["metadata"]["serverAddress"] == "http://prometheus.observability:9090"


def test_the_operator_finds_monitors_and_rules_by_labels() -> None:
    values = example("replicas") | {"monitoring": {"enabled": True, "labels": {"release": "prometheus"}}}
    found = {
        key for key, item in chart_objects(values).items() if item["metadata"]["labels"].get("release") == "prometheus"
    }
    monitors = {("ServiceMonitor", "foldserve"), ("ServiceMonitor", "foldserve-router")}
    assert found == monitors | {("PrometheusRule", "foldserve")}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"modle": "x"}, "modle"),
        ({"gpus": "two"}, "/gpus"),
        ({"maxQueue": 0}, "/maxQueue"),
        ({"image": {"digest": "sha256:1"}}, "/image/digest"),
        ({"keda": {"prometheus": "prometheus:9090"}}, "/keda/prometheus"),
        ({"storage": {"accessMode": "ReadOnlyMany"}}, "/storage/accessMode"),
        ({"router": {"replicas": 2}}, "replicas"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_wrong_value_is_refused_by_name(values: dict[str, Any], said: str) -> None:
    with pytest.raises(helm_python.HelmError, match=said):
        chart_objects(values)


def test_every_value_has_a_default_and_a_schema() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert set(yaml.safe_load((CHART / "values.yaml").read_text())) == set(schema["properties"]) - {"global"}


def test_a_packaged_chart_is_whole_and_has_no_links(tmp_path: Path) -> None:
    archive = Path(helm_python.package(CHART, destination=tmp_path))
    with tarfile.open(archive) as files:
        members = files.getmembers()
    assert all(member.isfile() for member in members)
    names = {member.name for member in members}
    assert "foldserve/rules/foldserve.yaml" in names
    assert not [name for name in names if "overlays" in name or "kustomization" in name or "examples" in name]
    assert chart_objects(example("replicas"), archive) == chart_objects(example("replicas"))


@pytest.mark.parametrize("link", ["k8s", "rules", "dashboards"])
def test_a_copy_without_its_links_is_refused(link: str, tmp_path: Path) -> None:
    """As of Flux, which leaves links of a Git repository out: half a release would look like a whole one."""
    copy = tmp_path / "helm"
    shutil.copytree(CHART, copy)
    shutil.rmtree(copy / link)
    with pytest.raises(helm_python.HelmError, match=rf"{link}/.*is not in the chart.*helm package deploy/helm"):
        chart_objects(example("gpu-single"), copy)


@pytest.mark.parametrize(
    ("values", "has", "has_not"),
    [
        ({}, ["foldserve-api-keys", "service/foldserve 8000", "llava-hf"], ["network policy lets in"]),
        (
            {"model": "", "apiKeys": {"enabled": False}, "router": {"enabled": True}},
            ["small demo model", "service/foldserve-router 8000", "apiKeys.enabled is false"],
            ["create secret"],
        ),
    ],
    ids=["keys", "router-without-keys"],
)
def test_the_notes_say_what_is_left_to_do(values: dict[str, Any], has: list[str], has_not: list[str]) -> None:
    with helm_python.Chart.load(CHART) as chart:
        notes = chart.render(values, name="mine", namespace="vision")["foldserve/templates/NOTES.txt"]
    assert all(text in notes for text in [*has, "kubectl -n vision"]) and not any(text in notes for text in has_not)
