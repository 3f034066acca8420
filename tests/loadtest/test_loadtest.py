"""The whole tool: against a fake server for what it does, once against a real one."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from foldserve.loadtest import bench, servers
from foldserve.loadtest.command import run
from foldserve.loadtest.grid import Block, Load, schedule
from foldserve.loadtest.options import LoadTestOptions
from foldserve.loadtest.record import BlockJournal, Record, SentRequests
from foldserve.loadtest.run import BlockRunner
from foldserve.loadtest.servers import Fleet
from foldserve.loadtest.trace import read_trace, replay
from foldserve.loadtest.workloads import Messages
from foldserve.server.cli import main
from tests.loadtest.fake_server import ENCODED, Fake, fake_server


@pytest.fixture
def fake() -> Iterator[Fake]:
    with fake_server() as server:
        yield server


def write_trace(file: Path, *questions: str) -> Path:
    lines = [
        {"timestamp_s": 0.02 * n, "output_tokens": 3, "messages": [{"role": "user", "content": question}]}
        for n, question in enumerate(questions)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def answered(requests: int) -> SentRequests:
    """Each in a second, with two tokens."""
    times, tokens = [1.0] * requests, [2] * requests
    return SentRequests(
        start_s=times, ttft_s=times, e2e_s=times, itl_s=[], prompt_tokens=tokens, output_tokens=tokens, errors=[]
    )


def test_a_trace_is_replayed_at_its_times(fake: Fake, tmp_path: Path) -> None:
    trace = read_trace(write_trace(tmp_path / "trace.jsonl", "one", "fail", "three"))
    chats: list[Messages] = [line.messages or [] for line in trace]
    began = time.perf_counter()
    sent = replay(fake.url, "fake", trace, chats, {"reduction": {"ratio": 0.5}}, speed=1)
    assert sent.output_tokens == [3, 3] and sent.prompt_tokens == [60, 60]
    assert [len(itl) for itl in sent.itl_s] == [2, 2]
    assert sent.errors == ["500 broken"]
    assert max(sent.start_s) - began >= 0.04
    assert all(0 < ttft <= e2e for ttft, e2e in zip(sent.ttft_s, sent.e2e_s, strict=True))
    with pytest.raises(RuntimeError, match="the first error was: 500 broken"):
        replay(fake.url, "fake", trace[1:2], chats[1:2], {}, speed=1)


def test_the_client_is_loaded_once_and_says_what_went_wrong(fake: Fake) -> None:
    """Every block has a process of its own, and none of them changes what the next one finds."""
    chats: list[Messages] = [[{"role": "user", "content": text}] for text in ("one", "fail", "three")]
    body = {"max_completion_tokens": 3}
    bench.preload()
    for round in range(2):
        sent = bench.send(fake.url, "fake", chats, body, Load(concurrency=1), 1.0, seed=round)
        assert (sent.output_tokens, sent.prompt_tokens) == ([3, 3], [110, 110])
        assert sent.errors == ["Internal Server Error"]
    with pytest.raises(RuntimeError, match=r"(?s)`vllm bench serve` ended with 1:.*burstiness"):
        bench.send(fake.url, "fake", chats, body, Load(rate=100), burstiness=0.0, seed=0)
    with pytest.raises(RuntimeError, match="no request was answered"):
        bench.send(fake.url, "fake", chats[1:2], body, Load(concurrency=1), 1.0, seed=0)


def test_a_run_ends_in_a_report_and_is_not_done_twice(fake: Fake, tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace.jsonl", "one", "two", "three")
    options = LoadTestOptions(
        tmp_path / "out", url=fake.url, trace=trace, ratios=(0.5,), rounds=2, speed=(4.0,), warm_up=1
    )
    report = run(options, [])
    assert [row.variant.label for row in report.rows] == ["ratio 0", "folder 0.5"]
    for row, kept in zip(report.rows, (ENCODED, ENCODED // 2), strict=True):
        assert (row.requests, row.failures, row.rounds) == (6, 0, 2)
        assert row.figures["vision_encoded"].value == ENCODED
        assert row.figures["vision_kept"].value == kept
    reductions = [body.get("reduction") is not None for body in fake.asked]
    assert reductions == [False, True] + [False] * 3 + [True] * 6 + [False] * 3  # warm-up, then ABBA
    assert run(options, []).rows == report.rows
    assert len(fake.asked) == 14
    assert (tmp_path / "out" / "index.html").is_file()
    more = run(dataclasses.replace(options, blocks=(2,)), []).rows
    assert [(row.requests, row.rounds, row.figures["vision_encoded"].value) for row in more] == [(12, 2, ENCODED)] * 2
    assert len(fake.asked) == 28  # another warm-up, and one more block of either in each round


def test_keys_come_from_the_environment(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.keys = ("of alice", "of prometheus")
    trace = write_trace(tmp_path / "trace.jsonl", "one", "two")
    options = LoadTestOptions(tmp_path / "out", url=fake.url, trace=trace, ratios=(), rounds=1, speed=(4.0,), warm_up=1)
    monkeypatch.setenv("OPENAI_API_KEY", "of alice")
    with pytest.raises(ValueError, match="set METRICS_KEY"):
        run(options, [])
    monkeypatch.setenv("METRICS_KEY", "of prometheus")
    (row,) = run(options, []).rows
    assert (row.requests, row.failures, row.figures["vision_encoded"].value) == (2, 0, ENCODED)
    assert not [file for file in (tmp_path / "out").rglob("*.*") if b"of alice" in file.read_bytes()]


def test_a_refused_variant_ends_the_run_before_anything_is_measured(fake: Fake, tmp_path: Path) -> None:
    fake.refuse = "this model can't"
    trace = write_trace(tmp_path / "trace.jsonl", "one")
    options = LoadTestOptions(tmp_path / "out", url=fake.url, trace=trace, ratios=(0.5,))
    with pytest.raises(ValueError, match=r"refuses folder 0\.5: this model can't"):
        run(options, [])
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_blocks_that_are_there_are_left_alone(fake: Fake, tmp_path: Path) -> None:
    options = LoadTestOptions(
        tmp_path, url=fake.url, ratios=(0.5,), rounds=2, concurrency=(1,), requests=(3,), image_size=28
    )
    asked: list[str] = []
    images: list[str] = []

    def send(url: str, model: str, chats: Sequence[Messages], body: dict[str, Any], block: Block) -> SentRequests:
        asked.append(block.key)
        images.extend(chat[0]["content"][0]["image_url"]["url"] for chat in chats)
        assert (url, model, body["max_completion_tokens"]) == (fake.url, "fake", 16)
        return answered(len(chats))

    variants, loads = options.grid()
    blocks = schedule(variants, loads, 2, beside=False)
    journal = BlockJournal(tmp_path, "run")
    done = SentRequests(start_s=[0], ttft_s=[1], e2e_s=[1], itl_s=[], prompt_tokens=[1], output_tokens=[1], errors=[])
    journal.add(blocks[1].key, Record(sent=done, counters={}, gauges={}, cpu_s={}))
    fleet = Fleet(options.urls(), {}, tmp_path, beside=False)
    BlockRunner(options, fleet, send).measure(blocks, variants, journal)
    assert asked == [blocks[0].key, blocks[2].key, blocks[3].key]
    assert len(set(images)) == len(images) == 9
    assert all(block.key in journal for block in blocks)
    variants, loads = dataclasses.replace(options, ratios=(0.25, 0.5), blocks=(2,)).grid()
    BlockRunner(options, fleet, send).measure(schedule(variants, loads, 2, beside=False), variants, journal)
    assert len(set(images)) == len(images) == 9 + 8 * 3, "added ones are new to a server that has seen the others"


@pytest.mark.parametrize(
    ("restart", "beside", "expected"),
    [
        (True, True, "+vllm vllm +foldserve foldserve -foldserve -vllm +foldserve foldserve +vllm vllm"),
        (True, False, "+vllm vllm -vllm +foldserve foldserve -foldserve +foldserve foldserve -foldserve +vllm vllm"),
        (False, True, "+vllm vllm +foldserve foldserve foldserve vllm"),
        (False, False, "+vllm vllm -vllm +foldserve foldserve foldserve -foldserve +vllm vllm"),
    ],
)
def test_servers_are_started_anew_for_every_round(
    restart: bool, beside: bool, expected: str, fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that what differs from start to start is in the intervals; the order of starts turns round too."""
    seen: list[str] = []

    class Started:
        """The fake server, as if it had been started here."""

        def __init__(self, name: str, options: Sequence[str], log: Path, variables: Mapping[str, str]) -> None:
            self.url, self._name = fake.url, name
            seen.append(f"+{name}")

        def cpu_s(self) -> dict[str, float]:
            return {}

        def stop(self) -> None:
            seen.append(f"-{self._name}")

    def send(url: str, model: str, chats: Sequence[Messages], body: dict[str, Any], block: Block) -> SentRequests:
        seen.append(block.point.variant.server)
        return answered(len(chats))

    monkeypatch.setattr(servers, "LocalServer", Started)
    options = LoadTestOptions(
        tmp_path, model="m", ratios=(), rounds=2, beside=beside, restart=restart,
        concurrency=(1,), requests=(1,), image_size=28,
    )  # fmt: skip
    variants, loads = options.grid()
    fleet = Fleet(options.urls(), options.server_options([]), tmp_path, beside=beside)
    blocks = schedule(variants, loads, options.rounds, beside=beside)
    BlockRunner(options, fleet, send).measure(blocks, variants, BlockJournal(tmp_path, "run"))
    assert " ".join(seen) == expected


def test_a_server_that_runs_is_not_started(tmp_path: Path) -> None:
    """Nor ended, even if one of its kind could be."""
    fleet = Fleet({"vllm": "http://a"}, {"vllm": ["m"], "foldserve": ["m"]}, tmp_path, beside=False)
    assert fleet.get("vllm") == (servers.RemoteServer("http://a"), False)
    fleet.stop()
    assert fleet.get("vllm") == (servers.RemoteServer("http://a"), False)


def test_the_variables_are_those_of_a_server_that_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made_up_server.py").write_text("import os\nprint('OURS is', os.environ['OURS'])\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setitem(servers._MODULES, "foldserve", "made_up_server")
    fleet = Fleet({}, {"foldserve": []}, tmp_path, beside=False, variables={"OURS": "set"})
    with pytest.raises(RuntimeError, match="OURS is set"):
        fleet.get("foldserve")
    assert "OURS" not in os.environ


def test_smoke(tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything at once: `foldserve serve`, `vllm bench serve`, and a report whose counts are the server's own."""
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")
    server = ["--dtype", "float32", "--max-model-len", "1024", "--enforce-eager", "--mm-processor-cache-gb", "0.1"]
    server += ["--kv-cache-memory-bytes", str(64 << 20)]
    main(["loadtest", str(tiny_llava), "--smoke", "--output", str(tmp_path), *server])
    full, folded = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert (full["label"], full["requests"], full["failures"]) == ("ratio 0", 4, 0)
    assert (folded["label"], folded["requests"], folded["failures"]) == ("folder 0.5", 4, 0)
    assert [row["figures"]["vision_encoded"]["value"] for row in (full, folded)] == [144, 144]
    assert [row["figures"]["vision_kept"]["value"] for row in (full, folded)] == [144, 72]
    assert folded["limit"]["requests_per_s"] > 1
    assert all(row["figures"]["api_cpu_s"]["value"] > 0 for row in (full, folded))
    assert full["figures"]["mm_cache_hit_share"]["value"] == 0  # every image is a new one
