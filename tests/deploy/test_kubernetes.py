"""The overlays as kubectl renders them: valid, within the restricted pod security standard, and consistent."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from tests.deploy.files import CUSTOM, DEPLOY, OVERLAYS, RULES, manifests, of_kind, rendered
from tests.deploy.pods import check_restricted


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_objects_fit_the_schemas(overlay: str) -> None:
    version = kubernetes_validate.latest_version()
    for item in manifests(overlay):
        if item["kind"] not in CUSTOM:
            kubernetes_validate.validate(item, version, strict=True)
        assert item["metadata"].get("namespace", item["metadata"]["name"]) == "foldserve"


def pods() -> list[Any]:
    return [
        pytest.param(deployment["spec"], id=f"{overlay}-{name}")
        for overlay in OVERLAYS
        for name, deployment in of_kind(overlay, "Deployment").items()
    ]


@pytest.mark.parametrize("spec", pods())
def test_pods_are_restricted(spec: dict[str, Any]) -> None:
    check_restricted(spec["template"]["spec"])
    for container in spec["template"]["spec"]["containers"]:
        assert container["securityContext"]["readOnlyRootFilesystem"] is True


@pytest.mark.parametrize("spec", pods())
def test_pods_say_when_they_live_and_when_they_are_ready(spec: dict[str, Any]) -> None:
    (container,) = spec["template"]["spec"]["containers"]
    named = {port["name"] for port in container["ports"]}
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["port"] in named
    assert "/read" in container["readinessProbe"]["httpGet"]["path"]
    assert "/live" in container["livenessProbe"]["httpGet"]["path"]
    assert container["lifecycle"]["preStop"]["sleep"]["seconds"] > container["readinessProbe"]["periodSeconds"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_names_that_objects_use_of_each_other_exist(overlay: str) -> None:
    labels = {
        name: deployment["spec"]["template"]["metadata"]["labels"]
        for name, deployment in of_kind(overlay, "Deployment").items()
    }

    def selected(selector: dict[str, str]) -> list[str]:
        return [name for name, has in labels.items() if selector.items() <= has.items()]

    for kind, path in (("Service", "selector"), ("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector")):
        found = of_kind(overlay, kind)
        assert set(found) == set(labels), kind
        for name, item in found.items():
            selector = item["spec"][path]
            assert selected(selector.get("matchLabels", selector)) == [name], (kind, name)
    for name, deployment in of_kind(overlay, "Deployment").items():
        assert selected(deployment["spec"]["selector"]["matchLabels"]) == [name]
        pod = deployment["spec"]["template"]["spec"]
        assert pod["serviceAccountName"] in of_kind(overlay, "ServiceAccount")
        for volume in pod["volumes"]:
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in of_kind(overlay, "PersistentVolumeClaim")
        mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
    for scaled in of_kind(overlay, "ScaledObject").values():
        target = of_kind(overlay, "Deployment")[scaled["spec"]["scaleTargetRef"]["name"]]
        assert "replicas" not in target["spec"]  # applying the overlay again would undo the scaling


@pytest.mark.parametrize("overlay", sorted(set(OVERLAYS) - {"cpu-demo"}))
def test_prometheus_asks_every_deployment_as_the_job_that_the_rules_name(overlay: str) -> None:
    services = of_kind(overlay, "Service").values()
    jobs = set()
    for monitor in of_kind(overlay, "ServiceMonitor").values():
        wanted = monitor["spec"]["selector"]["matchLabels"]
        (service,) = [item for item in services if wanted.items() <= item["metadata"]["labels"].items()]
        ports = {port["name"] for port in service["spec"]["ports"]}
        assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= ports
        jobs.add(service["metadata"]["labels"][monitor["spec"]["jobLabel"]])
    assert jobs == set(of_kind(overlay, "Deployment"))
    text = RULES.read_text()
    assert all(re.search(rf'job=~?"[^"]*\b{job}\b[|"]', text) for job in jobs)


def scrapes_without_a_key(objects: Iterable[dict[str, Any]]) -> list[str]:
    """ServiceMonitors of which a server with keys would get scrapes that bring none."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for item in objects:
        kinds.setdefault(item["kind"], []).append(item)
    found = []
    for deployment in kinds["Deployment"]:
        pod = deployment["spec"]["template"]
        words = pod["spec"]["containers"][0].get("args", [])
        if not any(word.startswith("--api-keys") for word in words) or "--open-metrics" in words:
            continue
        services = [s for s in kinds["Service"] if s["spec"]["selector"].items() <= pod["metadata"]["labels"].items()]
        for monitor in kinds.get("ServiceMonitor", []):
            wanted = monitor["spec"]["selector"]["matchLabels"].items()
            if any(wanted <= service["metadata"]["labels"].items() for service in services):
                keys = [end.get("authorization", {}).get("credentials", {}) for end in monitor["spec"]["endpoints"]]
                found += [] if all({"name", "key"} <= set(key) for key in keys) else [monitor["metadata"]["name"]]
    return found


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_scrapes_of_a_server_with_keys_bring_one(overlay: str) -> None:
    assert scrapes_without_a_key(manifests(overlay)) == []
    brought = {
        end["authorization"]["credentials"]["name"]
        for monitor in of_kind(overlay, "ServiceMonitor").values()
        for end in monitor["spec"]["endpoints"]
        if "authorization" in end
    }
    mounted = {
        volume["secret"]["secretName"]
        for deployment in of_kind(overlay, "Deployment").values()
        for volume in deployment["spec"]["template"]["spec"]["volumes"]
        if "secret" in volume
    }
    assert not brought & mounted, "a server needs hashes only"


@pytest.mark.parametrize(
    ("components", "found"),
    [
        (["monitoring", "api-keys"], []),
        (["api-keys", "monitoring"], ["foldserve"]),
        (["monitoring"], []),
        (["api-keys"], []),
    ],
    ids=lambda value: "-".join(value) or "nothing",
)
def test_a_scrape_without_a_key_is_found(components: list[str], found: list[str], tmp_path: Path) -> None:
    folder = os.path.relpath(DEPLOY / "k8s", tmp_path.resolve())
    listed = "".join(f"  - {folder}/components/{name}\n" for name in components)
    (tmp_path / "kustomization.yaml").write_text(f"resources: [{folder}/base]\ncomponents:\n{listed}")
    assert scrapes_without_a_key(rendered(tmp_path)) == found


def test_who_may_reach_a_server() -> None:
    router = of_kind("replicas", "Deployment")["foldserve-router"]["spec"]["template"]["metadata"]["labels"]
    policy = of_kind("replicas", "NetworkPolicy")["foldserve"]["spec"]
    peers = list(chain.from_iterable(rule["from"] for rule in policy["ingress"]))
    assert any(peer.get("podSelector", {}).get("matchLabels", {"": ""}).items() <= router.items() for peer in peers)
    blocks = [peer["ipBlock"] for rule in policy["egress"] for peer in rule["to"] if "ipBlock" in peer]
    private = set(chain.from_iterable(block.get("except", []) for block in blocks))
    assert {"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "127.0.0.0/8"} <= private


@pytest.mark.parametrize(("overlay", "gpus"), [("cpu-demo", None), ("gpu-single", 1), ("replicas", 1)])
def test_gpus_and_keys(overlay: str, gpus: int | None) -> None:
    pod = of_kind(overlay, "Deployment")["foldserve"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"].get("nvidia.com/gpu") == gpus
    has_keys = any(argument.startswith("--api-keys=") for argument in container["args"])
    assert has_keys == (gpus is not None)
