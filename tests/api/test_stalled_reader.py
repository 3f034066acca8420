"""A server whose output nobody reads still starts, answers, counts lost log lines, and ends.

The tests share it and run in order; the last one ends it.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.live import PATIENCE_S, Live

REQUESTS = 1500
DROPPED = "foldserve_log_lines_dropped_total"
ENDS_WITHIN_S = 20  # without a drain; the processes end one after the other


class Reader:
    """`cat` into a file, stopped and started; the server's standard output and error are one pipe to it."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "read"
        reads, self.pipe = os.pipe()
        with self.file.open("wb") as out:
            self.process = subprocess.Popen(["cat"], stdin=reads, stdout=out)
        os.close(reads)
        self.stall()

    def stall(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def lines(self) -> list[dict[str, Any]]:
        """The lines of JSON among what was read so far."""
        whole = self.file.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    reader = Reader(tmp_path_factory.mktemp("reader"))
    yield reader
    reader.process.kill()
    reader.process.wait()


@pytest.fixture(scope="module")
def live(tiny_llava: Path, reader: Reader, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("live")
    server = Live(tiny_llava, folder, "--log-format", "json", "--verbose", output=reader.pipe)
    os.close(reader.pipe)
    yield server
    server.end()


def ask_until_lines_are_dropped(live: Live) -> int:
    """Sends requests that cost a long line each; how many."""
    before, sent = live.metrics(DROPPED), 0
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=PATIENCE_S)
    while live.metrics(DROPPED) == before:
        for _ in range(REQUESTS):
            connection.request("GET", "/v1/models", headers={"X-Request-Id": "x" * 128})
            answer = connection.getresponse()
            assert (answer.status, bool(answer.read())) == (200, True)
            sent += 1
        assert live.is_ready()
    connection.close()
    return sent


def requests(lines: list[dict[str, Any]]) -> int:
    return sum(line.get("request_id") == "x" * 128 for line in lines)


def dropped(lines: list[dict[str, Any]]) -> int:
    """As the warnings say."""
    told = [line["message"] for line in lines if line["logger"] == "foldserve.server.output"]
    return sum(int(message.rpartition(": ")[2].split()[0]) for message in told)


def test_a_stalled_reader_stops_nothing(live: Live, reader: Reader) -> None:
    sent = ask_until_lines_are_dropped(live)
    assert sent > 1000
    assert live.chat().status == 200
    reader.go_on()
    live.wait(lambda: dropped(reader.lines()) > 0)
    live.wait(lambda: live.metrics(DROPPED) == dropped(reader.lines()))
    lines = reader.lines()
    assert sent <= requests(lines) + dropped(lines) <= sent + 1  # the chat's line may be among those
    assert live.ask("GET", "/v1/models", x_request_id="after").status == 200
    live.wait(lambda: any(line.get("request_id") == "after" for line in reader.lines()))


def test_a_stalled_reader_does_not_hold_up_the_end(live: Live, reader: Reader) -> None:
    reader.stall()
    ask_until_lines_are_dropped(live)
    live.terminate()
    assert live.process.wait(ENDS_WITHIN_S) == 0
