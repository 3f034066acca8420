"""A short soak of a real server with two API processes, and what the soak would say of a bad one."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from foldserve.loadtest.soak.__main__ import main
from foldserve.loadtest.soak.load import Outcome
from foldserve.loadtest.soak.mix import HangUp, plan
from foldserve.loadtest.soak.report import Report
from foldserve.loadtest.soak.server import Held

REQUESTS, STREAMS = 300, 64


def test_nothing_is_left_over(tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")
    out = tmp_path / "report.json"
    options = ["--requests", str(REQUESTS), "--warm-share", "0.5", "--at-once", "16", "--streams", str(STREAMS)]
    server = [str(tiny_llava), "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"]
    server += ["--kv-cache-memory-bytes", str(64 << 20), "--mm-processor-cache-gb", "0.1", "--api-server-count", "2"]
    main([*options, "--output", str(out), "--", *server])
    report = json.loads(out.read_text())
    assert report["failures"] == []
    assert report["soak"]["counts"]["answered 200"] > REQUESTS / 2
    assert sum(report["soak"]["counts"].values()) == REQUESTS
    assert report["streams"]["counts"] == {"answered 200": STREAMS}


def test_the_mix() -> None:
    """Every kind of end, at about the share that was asked for, and the same again from the same seed."""
    requests = list(plan(2000, 0.3, seed=1))
    ends = Counter(request.hang_up for request in requests)
    assert set(ends) == set(HangUp)
    assert 0.25 < 1 - ends[HangUp.NEVER] / 2000 < 0.35
    assert 0 < sum(request.expected == 400 for request in requests) < 200
    assert requests == list(plan(2000, 0.3, seed=1))


GOOD = Report(Held(0, 0, 100, 1000), Held(0, 0, 99, 1040), Outcome(), Outcome(ready_s=0.5), 0, 1.0)


@pytest.mark.parametrize(
    ("report", "failure"),
    [
        (replace(GOOD, end=replace(GOOD.end, requests=1)), "1 requests"),
        (replace(GOOD, warm=replace(GOOD.warm, kv_share=0.01)), "1.00% of the KV cache"),
        (replace(GOOD, end=replace(GOOD.end, files=101)), "file descriptors: 100 when warm, 101 at the end"),
        (replace(GOOD, end=replace(GOOD.end, memory_bytes=1051)), "memory grew by 5.1%"),
        (replace(GOOD, soak=Outcome(wrong=["200 was expected: 500"])), "200 was expected: 500"),
        (replace(GOOD, streams=Outcome(ready_s=1.5)), "took 1.50 s"),
        (replace(GOOD, exit_status=-9), "ended with -9"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_server_is_called_bad(report: Report, failure: str) -> None:
    (said,) = report.failures()
    assert failure in said
    assert list(GOOD.failures()) == []
