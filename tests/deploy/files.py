"""The files of deploy/, read by their own tools: kubectl, docker compose, PromQL's parser."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import promql_parser
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE = DEPLOY / "compose" / "compose.yaml"
RULES = DEPLOY / "prometheus" / "rules" / "foldserve.yaml"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "foldserve.json"
CUSTOM = {"PrometheusRule", "ScaledObject", "ServiceMonitor"}
"""Kinds of Prometheus' operator and KEDA: no schema of Kubernetes."""
OVERLAYS = ("cpu-demo", "gpu-single", "replicas")
PROFILES = ("cpu", "gpu", "router", "router-cpu")
DOCKERFILES = ("Dockerfile", "deploy/Dockerfile.cpu", "deploy/Dockerfile.router")

_GRAFANA = {"$__rate_interval": "30m", "$__range": "30m", "$job": ".*", "$instance": ".*"}
_COMPARISONS = {"==", "!=", ">", "<", ">=", "<="}


def run(tool: str, *arguments: str | Path, **environment: str) -> str:
    """Standard output of a program of this environment, which has to succeed."""
    command = [str(Path(sys.executable).parent / tool), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment or None, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


@cache
def manifests(overlay: str) -> tuple[dict[str, Any], ...]:
    """The objects of an overlay."""
    return rendered(DEPLOY / "k8s" / "overlays" / overlay)


def rendered(folder: Path) -> tuple[dict[str, Any], ...]:
    """The objects of a kustomization."""
    return tuple(yaml.safe_load_all(run("kubectl", "kustomize", folder)))


def of_kind(overlay: str, kind: str) -> dict[str, dict[str, Any]]:
    """An overlay's objects of one kind, by name."""
    return {item["metadata"]["name"]: item for item in manifests(overlay) if item["kind"] == kind}


@cache
def compose(profile: str) -> dict[str, Any]:
    """The services that a profile starts, with all defaults filled in."""
    text = run(
        "docker-compose", "-f", COMPOSE, "--profile", profile, "config", "--format", "json", PATH="/usr/bin:/bin"
    )
    services: dict[str, Any] = json.loads(text)["services"]
    return services


def container(overlay: str, deployment: str) -> dict[str, Any]:
    """The only container of a Deployment."""
    (only,) = of_kind(overlay, "Deployment")[deployment]["spec"]["template"]["spec"]["containers"]
    return dict(only)


def arguments(container: Mapping[str, Any]) -> list[str]:
    """A container's arguments with `$(NAME)` filled in; what only the cluster knows becomes its path."""
    values = {item["name"]: item.get("value") or str(item["valueFrom"]) for item in container.get("env", [])}
    return [re.sub(r"\$\((\w+)\)", lambda name: values[name[1]], text) for text in container["args"]]


def server_commands() -> dict[str, list[str]]:
    """Arguments of `foldserve serve` as every file in deploy/ gives them."""
    commands = {f"k8s-{name}": arguments(container(name, "foldserve")) for name in OVERLAYS}
    for profile in PROFILES:
        for name, service in compose(profile).items():
            if service["image"].startswith("foldserve:"):
                commands[f"compose-{name}"] = service["command"]
    return commands


def router_commands() -> dict[str, list[str]]:
    """Arguments of `vllm-router`."""
    return {
        "k8s": arguments(container("replicas", "foldserve-router")),
        "compose": compose("router")["router"]["command"],
    }


def rules() -> list[dict[str, Any]]:
    """Recording and alert rules."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    """The dashboard's panels that show something."""
    every = json.loads(DASHBOARD.read_text())["panels"]
    return [panel for panel in every if panel["type"] != "row"]


def expressions() -> dict[str, str]:
    """Every PromQL expression of ours: rules, panels, scaling. Grafana's variables are filled in."""
    found = {rule.get("record") or rule["alert"]: rule["expr"] for rule in rules()}
    for panel in panels():
        for target in panel["targets"]:
            text = target["expr"]
            for name, value in _GRAFANA.items():
                text = text.replace(name, value)
            found[f"{panel['title']} / {target['legendFormat']}"] = text
    for trigger in of_kind("replicas", "ScaledObject")["foldserve"]["spec"]["triggers"]:
        found[f"scale by {trigger['name']}"] = trigger["metadata"]["query"]
    return found


def without_threshold(expression: str) -> str:
    """An alert's expression without its comparison, which a healthy server doesn't fulfil."""
    tree = promql_parser.parse(expression)
    if isinstance(tree, promql_parser.BinaryExpr) and str(tree.op) in _COMPARISONS:
        tree = tree.lhs
    return tree.prettify()


def metrics(expression: str) -> set[str]:
    """Names of the series that an expression reads."""
    names: set[str | None] = set()

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            names.add(node.name)
        elif isinstance(node, promql_parser.MatrixSelector):
            names.add(node.vector_selector.name)

    promql_parser.walk(promql_parser.parse(expression), visit)
    return {name for name in names if name}
