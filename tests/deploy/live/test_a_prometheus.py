"""Rules and dashboard on a real Prometheus that scrapes real servers under load."""

from __future__ import annotations

import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deploy.files import DEPLOY, RULES, expressions, metrics, rules, run, without_threshold
from tests.deploy.live.clients import Load, ask, body
from tests.deploy.live.conftest import Fleet
from tests.deploy.live.processes import QUEUE, wait_for

WINDOW_S = 300
"""Of the rules' rates: what has not shown by then never will."""


def query(url: str, expression: str) -> list[dict[str, Any]]:
    answer = httpx.get(f"{url}/api/v1/query", params={"query": expression}, timeout=30).json()
    assert answer["status"] == "success", answer
    return list(answer["data"]["result"])


def overload(url: str) -> None:
    """More requests at once than a server runs and lets wait."""
    with ThreadPoolExecutor(4 * QUEUE) as pool:
        burst = pool.map(lambda seed: ask(url, body(0.5, seed, tokens=64)).status_code, range(4 * QUEUE))
        statuses = Counter(burst)
    assert set(statuses) == {200, 503} and statuses[200] >= 2 * QUEUE


@pytest.fixture(scope="session")
def watched(fleet: Fleet) -> str:
    """Prometheus after requests at several ratios, and more at once than a server takes."""
    with Load(fleet.router) as load:
        load.wait_for(30)
    assert load.ended == {"right": load.ended.total()}
    one = next(iter(fleet.servers))
    overload(one)
    refused = 'http_requests_total{status="5xx"}'
    wait_for("Prometheus to see a refusal", lambda: bool(query(fleet.prometheus, refused)))
    overload(one)  # `rate` counts from the second sample of a series on

    def recorded() -> bool:
        names = {rule["record"] for rule in rules() if "record" in rule}
        seen = {
            sample["metric"]["__name__"] for sample in query(fleet.prometheus, f'{{__name__=~"{"|".join(names)}"}}')
        }
        alerts = query(fleet.prometheus, 'ALERTS{alertname="FoldserveErrors"}')
        return names <= seen and bool(alerts)

    wait_for("the recording rules and the alert", recorded, WINDOW_S)
    return fleet.prometheus


def test_promtool(tmp_path: Path) -> None:
    run("promtool", "check", "rules", RULES)
    folder = tmp_path / "prometheus"
    shutil.copytree(DEPLOY / "prometheus", folder)
    (folder / "metrics-key").write_text("none")  # as compose does
    run("promtool", "check", "config", folder / "prometheus.yml")
    run("promtool", "test", "rules", DEPLOY / "prometheus" / "tests" / "foldserve.yaml")


@pytest.mark.parametrize("name", sorted(expressions()))
def test_an_expression_has_a_result(name: str, watched: str) -> None:
    expression = expressions()[name]
    assert query(watched, without_threshold(expression)), f"{name} is empty: {expression}"
    query(watched, expression)


def test_every_metric_is_exposed(watched: str, fleet: Fleet) -> None:
    used = {metric for expression in expressions().values() for metric in metrics(expression)}
    known = {rule.get("record") for rule in rules()} | {"up"}
    page = httpx.get(f"{next(iter(fleet.servers))}/metrics").text
    exposed = {line.split("{")[0].split(" ")[0] for line in page.splitlines() if not line.startswith("#")}
    assert used - known <= exposed


def test_the_router_is_scraped(watched: str, fleet: Fleet) -> None:
    assert query(watched, 'up{job="foldserve-router"} == 1')
    assert "vllm_router_requests_total" in httpx.get(fleet.router_metrics).text


def test_overload_raises_its_alert_and_no_other_goes_off(watched: str) -> None:
    raised = {sample["metric"]["alertname"] for sample in query(watched, "count_over_time(ALERTS[1h])")}
    assert "FoldserveErrors" in raised
    # Until its first scrape, a Prometheus knows no server: FoldserveDown waits, as it should.
    assert not query(watched, 'count_over_time(ALERTS{alertstate="firing"}[1h])')
