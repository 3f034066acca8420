"""Every option, path and metric that deploy/ names exists."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import promql_parser
import pytest
from prometheus_client import REGISTRY

from tests.deploy.files import (
    DEPLOY,
    DOCKERFILES,
    OVERLAYS,
    PROFILES,
    ROOT,
    compose,
    expressions,
    metrics,
    of_kind,
    rules,
    server_commands,
)

KEYS = '[[key]]\nname = "alice"\nsha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"\n'


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[list[str]], Namespace]:
    """The arguments with which `foldserve serve ARGUMENTS` would start vLLM."""
    from foldserve.server import cli
    from foldserve.server.api import launch

    keys = tmp_path / "api-keys.toml"
    keys.write_text(KEYS)
    started: list[Namespace] = []

    def serve(*options: Any) -> None:
        started.append(launch.serve_args(*options))

    def parse(argv: list[str]) -> Namespace:
        monkeypatch.setattr(launch, "serve", serve)
        cli.main(["serve", *(word.replace("/run/foldserve/api-keys.toml", str(keys)) for word in argv)])
        return started.pop()

    return parse


@pytest.mark.parametrize("place", sorted(server_commands()))
def test_the_server_takes_its_options_and_has_the_time_to_drain(
    place: str, parsed: Callable[[list[str]], Namespace]
) -> None:
    args = parsed(server_commands()[place])
    where, _, name = place.partition("-")
    if where == "k8s":
        pod = of_kind(name, "Deployment")["foldserve"]["spec"]["template"]["spec"]
        given = pod["terminationGracePeriodSeconds"] - pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    else:
        (service,) = {str(s): s for profile in PROFILES for n, s in compose(profile).items() if n == name}.values()
        minutes, seconds = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", service["stop_grace_period"]).groups()  # type: ignore[union-attr]
        given = 60 * int(minutes or 0) + int(seconds or 0)
    assert given > args.shutdown_timeout  # ours and what the engine may take after it


def test_the_example_settings_are_taken(parsed: Callable[[list[str]], Namespace]) -> None:
    text = (DEPLOY / "compose" / ".env.example").read_text()
    settings = dict(re.findall(r"^([A-Z_]+)=(.*)$", text, re.MULTILINE))
    args = parsed([settings["MODEL"], *settings["ARGS"].split()])
    assert (args.model_tag, args.max_model_len) == ("llava-hf/llava-1.5-7b-hf", 4096)


def test_health_is_asked_at_paths_that_the_server_has() -> None:
    from foldserve.server.api.lifecycle.health import health

    known = {getattr(route, "path", None) for route in health.routes}
    asked = {re.search(r"8000(/[a-z/]+)", (ROOT / name).read_text())[1] for name in DOCKERFILES}  # type: ignore[index]
    for overlay in OVERLAYS:
        (container,) = of_kind(overlay, "Deployment")["foldserve"]["spec"]["template"]["spec"]["containers"]
        asked |= {container[f"{probe}Probe"]["httpGet"]["path"] for probe in ("startup", "liveness", "readiness")}
    assert asked == known


@pytest.mark.parametrize("name", sorted(expressions()))
def test_expressions_are_promql(name: str) -> None:
    promql_parser.parse(expressions()[name])


def test_metrics_exist() -> None:
    # A scrape of a real server is asked the same in `make test-deploy`.
    import foldserve.server.api.plugin
    import foldserve.server.engine.stats  # noqa: F401

    families = {family.name: family.type for family in REGISTRY.collect()}
    used = {metric for expression in expressions().values() for metric in metrics(expression)}
    used -= {rule.get("record") for rule in rules()}
    for family, kind in families.items():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "gauge": [""]}.get(kind, [])
        used -= {family + suffix for suffix in suffixes}
    origin = find_spec("vllm.v1.metrics.loggers")
    assert origin is not None and origin.origin is not None
    source = Path(origin.origin).read_text()
    vllm = set(re.findall(r'"(vllm:\w+)"', source))
    used -= {name + suffix for name in vllm for suffix in ("", "_total", "_bucket", "_sum", "_count")}
    assert used <= {"up", "http_requests_total"}
