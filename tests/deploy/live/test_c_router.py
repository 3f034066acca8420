"""Two servers behind vllm-router with the options of deploy/: what passes, an update, and a server that is gone."""

from __future__ import annotations

import argparse
import json
import re
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.deploy.files import router_commands
from tests.deploy.live.clients import KINDS, TIMEOUT_S, Load, ask, body, is_right
from tests.deploy.live.conftest import Fleet
from tests.deploy.live.processes import QUEUE, wait_for


def finished(url: str) -> float:
    """Requests that a server has answered."""
    page = httpx.get(f"{url}/metrics").text
    return sum(float(value) for value in re.findall(r"^vllm:request_success_total\{.*\} (\S+)$", page, re.MULTILINE))


def retries(fleet: Fleet) -> float:
    """Times that the router has sent a request again."""
    page = httpx.get(fleet.router_metrics).text
    return sum(float(value) for value in re.findall(r"^vllm_router_retries_total\S* (\S+)$", page, re.MULTILINE))


@pytest.mark.parametrize("place", sorted(router_commands()))
def test_the_router_takes_its_options(place: str) -> None:
    from vllm_router.router_args import RouterArgs

    parser = argparse.ArgumentParser(allow_abbrev=False)
    RouterArgs.add_cli_args(parser)
    args = parser.parse_args(router_commands()[place])
    assert args.health_check_endpoint == "/health/ready"


def test_reduction_usage_and_errors_pass(fleet: Fleet) -> None:
    for ratio, withdraw in KINDS:
        request = body(ratio, 1, withdraw=withdraw)
        assert is_right(request, ask(fleet.router, request))
    refused = ask(fleet.router, body(7, 1))
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "reduction.ratio"


def test_streams_pass(fleet: Fleet) -> None:
    request = body(0.5, 1) | {"stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", f"{fleet.router}/v1/chat/completions", json=request, timeout=TIMEOUT_S) as answer:
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["usage"]["vision_tokens"]["kept"] == 72


def test_both_servers_are_asked(fleet: Fleet) -> None:
    before = {url: finished(url) for url in fleet.servers}
    with ThreadPoolExecutor(QUEUE) as pool:
        answers = list(pool.map(lambda seed: ask(fleet.router, body(0.5, seed, tokens=32)), range(3 * QUEUE)))
    assert all(answer.status_code == 200 for answer in answers)
    got = [finished(url) - before[url] for url in fleet.servers]
    print("asked at once:", got)
    assert sum(got) == 3 * QUEUE and min(got) > 0


def test_a_rolling_update_drops_nothing(fleet: Fleet) -> None:
    before = retries(fleet)
    with Load(fleet.router) as load:
        for process in fleet.servers.values():
            load.wait_for(6)
            assert process.terminate() == 0
            load.wait_for(6)  # by the other one
            process.start()
            process.wait_until_ready()
            wait_for("the router", lambda: all_are_healthy(fleet))
    print("rolling update:", dict(load.ended), "retries:", retries(fleet) - before)
    assert load.ended == {"right": load.ended.total()}


def test_a_server_that_is_gone_costs_no_request_that_can_be_sent_again(fleet: Fleet) -> None:
    gone, before = next(iter(fleet.servers.values())), retries(fleet)
    with Load(fleet.router, clients=6) as load:
        load.wait_for(6)
        gone.kill()
        load.wait_for(100)
    print("server gone:", dict(load.ended), "retries:", retries(fleet) - before)
    assert load.ended == {"right": load.ended.total()}
    assert retries(fleet) > before


def all_are_healthy(fleet: Fleet) -> bool:
    """To the router's knowledge."""
    return bool(httpx.get(f"{fleet.router}/readiness").json()["healthy_workers"] == len(fleet.servers))
