"""A short soak test of a real server with two API processes, and what it reports of a faulty one."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from foldserve.loadtest.soak.__main__ import main
from foldserve.loadtest.soak.death import Death
from foldserve.loadtest.soak.load import LoadOutcome
from foldserve.loadtest.soak.mix import HangUp, plan
from foldserve.loadtest.soak.report import SoakReport
from foldserve.loadtest.soak.server import HeldResources

REQUESTS, STREAMS, LOOKS, AT_ONCE = 300, 64, 2, 16


def test_nothing_is_left_over(tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")
    out = tmp_path / "report.json"
    options = ["--requests", str(REQUESTS), "--warm-share", "0.5", "--at-once", str(AT_ONCE)]
    options += ["--ready-within", "5"]  # seconds: a hang is a failure here, how long it took is for the soak itself
    options += ["--streams", str(STREAMS), "--looks", str(LOOKS), "--output", str(out)]
    server = [str(tiny_llava), "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"]
    server += ["--kv-cache-memory-bytes", str(64 << 20), "--mm-processor-cache-gb", "0.1", "--api-server-count", "2"]
    main([*options, "--", *server])
    report = json.loads(out.read_text())
    assert report["failures"] == []
    assert report["soak"]["counts"]["answered 200"] > REQUESTS / 2
    assert sum(report["soak"]["counts"].values()) == REQUESTS
    assert report["streams"]["counts"] == {"answered 200": STREAMS}
    assert report["death"]["clients"] == AT_ONCE
    assert len(report["looks"]) == 1 + LOOKS


def test_the_mix() -> None:
    """Every kind of end, at about the share that was asked for, and the same again from the same seed."""
    requests = list(plan(2000, 0.3, seed=1))
    ends = Counter(request.hang_up for request in requests)
    assert set(ends) == set(HangUp)
    assert 0.25 < 1 - ends[HangUp.NEVER] / 2000 < 0.35
    assert 0 < sum(request.expected == 400 for request in requests) < 200
    assert requests == list(plan(2000, 0.3, seed=1))


HELD = HeldResources(0, 0, 100, {"engine": 600, "api": 400})
DEATH = Death(clients=9, red_s=0.9, heard_s=4.9, ended_s=9.9, exit_status=1)
GOOD = SoakReport(
    [HELD, replace(HELD, files=99, memory={"engine": 640, "api": 400})], LoadOutcome(), LoadOutcome(), DEATH, 1.0
)


def ends_with(**fields: Any) -> SoakReport:
    return replace(GOOD, looks=[HELD, replace(HELD, **fields)])


@pytest.mark.parametrize(
    ("report", "failure"),
    [
        (ends_with(requests=1), "1 requests"),
        (replace(GOOD, looks=[replace(HELD, kv_share=0.01), HELD]), "1.00% of the KV cache"),
        (ends_with(files=101), "file descriptors: 100 when warm, 101 at the end"),
        (ends_with(memory={"engine": 651, "api": 400}), "memory grew by 5.1%"),
        (replace(GOOD, soak=LoadOutcome(wrong=["200 was expected: 500"])), "200 was expected: 500"),
        (replace(GOOD, soak=LoadOutcome(ready_s=1.2)), "took 1.20 s beside the mixed requests"),
        (replace(GOOD, streams=LoadOutcome(ready_s=1.5)), "took 1.50 s beside the streams"),
        (replace(GOOD, streams=LoadOutcome(ready_s=5.1), ready_within_s=5.0), "took 5.10 s beside the streams"),
        (replace(GOOD, death=replace(DEATH, wrong=["instead of an answer"])), "instead of an answer"),
        (replace(GOOD, death=replace(DEATH, red_s=5.1)), "green for 5.10 s"),
        (replace(GOOD, death=replace(DEATH, heard_s=5.1)), "heard of it after 5.10 s"),
        (replace(GOOD, death=replace(DEATH, ended_s=11)), "ended after 11.00 s"),
        (replace(GOOD, death=replace(DEATH, exit_status=0)), "ended with status 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_server_is_called_bad(report: SoakReport, failure: str) -> None:
    (said,) = report.failures()
    assert failure in said
    assert list(GOOD.failures()) == []
