"""The engine runs, but vLLM's task that reads its outputs fails: the server treats this like the engine's death.

The failure is injected by a plugin of vLLM's that these servers find on their path.
"""

from __future__ import annotations

import json
import os
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.api.live import CHAT, PATIENCE_S, Live, chat

SEATS = 4
PLUGIN = """
import asyncio, builtins, os

TRIGGER = os.environ["FAILING_OUTPUTS_TRIGGER"]

def register():
    from vllm.v1.engine.output_processor import OutputProcessor

    process = OutputProcessor.process_outputs
    if process.__name__ == "failing":
        return

    def failing(self, outputs, *args, **kwargs):
        if outputs and os.path.exists(TRIGGER):
            taken = f"{TRIGGER}.{os.getpid()}"
            try:
                os.rename(TRIGGER, taken)  # one process gets it
            except FileNotFoundError:
                return process(self, outputs, *args, **kwargs)
            name = open(taken).read()
            raise getattr(builtins, name, None) or getattr(asyncio, name)
        return process(self, outputs, *args, **kwargs)

    OutputProcessor.process_outputs = failing
"""


@pytest.fixture
def trigger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with the name of an exception in it; the first outputs after it was written raise that."""
    plugin = tmp_path / "path"
    metadata = plugin / "failing_outputs-1.dist-info"
    metadata.mkdir(parents=True)
    (plugin / "failing_outputs.py").write_text(textwrap.dedent(PLUGIN))
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: failing-outputs\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[vllm.general_plugins]\nfailing_outputs = failing_outputs:register\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(plugin), os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("FAILING_OUTPUTS_TRIGGER", str(tmp_path / "trigger"))
    return tmp_path / "trigger"


@pytest.fixture
def live(processes: str, trigger: Path, tiny_llava: Path, tmp_path: Path) -> Iterator[Live]:
    server = Live(tiny_llava, tmp_path, "--api-server-count", processes, "--max-num-seqs", str(SEATS))
    yield server
    server.end()


@pytest.mark.parametrize(("processes", "error"), [("1", "TypeError"), ("2", "ValueError"), ("2", "CancelledError")])
def test_outputs_that_can_not_be_read(live: Live, trigger: Path, error: str) -> None:
    """Whole answers and streams, some of which wait: all are told that the engine stopped, and that ends the server."""
    answers: list[tuple[int, str]] = []

    def listen(number: int) -> None:
        connection = live.connect()
        live.send(connection, "POST", CHAT, chat(max_tokens=900, stream=number % 2 == 0))
        response = connection.getresponse()
        answers.append((response.status, response.read().decode()))
        connection.close()

    clients = [threading.Thread(target=listen, args=(number,)) for number in range(2 * SEATS)]
    for client in clients:
        client.start()
    live.wait(lambda: live.metrics("vllm:num_requests_running") >= SEATS)
    tree = live.tree()
    part = trigger.with_suffix(".part")
    part.write_text(error)
    part.rename(trigger)
    live.wait(lambda: not live.is_ready())
    for client in clients:
        client.join(PATIENCE_S)
    assert len(answers) == len(clients)
    for status, text in answers:
        assert status in {200, 503}, text
        last = text if status == 503 else text.split("data: ")[-2]
        assert json.loads(last)["error"]["code"] == "engine_stopped"
        assert status == 503 or text.endswith("data: [DONE]\n\n")
    assert live.process.wait(PATIENCE_S) not in (0, None)
    live.wait(lambda: not any(runs(process) for process in tree))


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
