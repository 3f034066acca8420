"""Request ids and the shape of log lines; no server."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import string
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send

from foldserve.server.api.logs.config import STARTUP, VARIABLE, json_formatter, logging_config, shared_logging_config
from foldserve.server.api.logs.context import RequestIdFilter, choose_request_id, request_id
from foldserve.server.api.logs.middleware import RequestLog


@given(st.none() | st.text())
def test_a_request_id_is_harmless(sent: str | None) -> None:
    chosen = choose_request_id(sent)
    assert 1 <= len(chosen) <= 128
    assert set(chosen) <= set(string.ascii_letters + string.digits + "._:-")
    assert chosen == sent or len(chosen) == 32


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What the logger of requests writes, as JSON."""
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(json_formatter())
    handler.addFilter(RequestIdFilter())
    logger = logging.getLogger("foldserve")
    logger.addHandler(handler)
    level, logger.level = logger.level, logging.INFO
    yield out
    logger.setLevel(level)
    logger.removeHandler(handler)


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    """Says which request id it saw, in the header and in the context."""
    if scope["path"] == "/health":
        scope["state"] = {"foldserve_quiet": True}
    while (await receive()).get("more_body"):
        pass
    seen = dict(scope["headers"])[b"x-request-id"].decode()
    body = json.dumps([seen, request_id.get()]).encode()
    logging.getLogger("foldserve.work").warning("at it")
    status = 500 if scope["query_string"] else 200
    await send({"type": "http.response.start", "status": status, "headers": [(b"x-request-id", b"theirs")]})
    await send({"type": "http.response.body", "body": body})


def ask(path: str, **headers: str) -> httpx.Response:
    async def get() -> httpx.Response:
        transport = httpx.ASGITransport(RequestLog(application))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(get())


def test_one_line_a_request(lines: io.StringIO) -> None:
    answer = ask("/some/path", **{"X-Request-Id": "mine"})
    assert answer.headers.get_list("x-request-id") == ["mine"]
    assert answer.json() == ["mine", "mine"]
    work, request = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert (work["message"], work["request_id"], work["logger"]) == ("at it", "mine", "foldserve.work")
    assert (request["method"], request["status"], request["request_id"]) == ("GET", 200, "mine")
    assert request["route"] is None, "no declared route: the path itself is not logged"
    assert "some" not in lines.getvalue()


def test_an_id_of_our_own(lines: io.StringIO) -> None:
    answer = ask("/", **{"X-Request-Id": "not good"})
    assert answer.json() == [answer.headers["x-request-id"]] * 2
    assert len(answer.json()[0]) == 32


def test_health_checks_are_logged_when_they_fail(lines: io.StringIO) -> None:
    def logged(path: str) -> int:
        before = len(lines.getvalue().splitlines())
        ask(path)
        return len(lines.getvalue().splitlines()) - before - 1

    assert logged("/health") == 0
    assert logged("/health?broken") == 1


def test_a_client_that_has_gone_got_no_status(lines: io.StringIO) -> None:
    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": []}
    asyncio.run(RequestLog(application)(scope, receive, send))
    assert json.loads(lines.getvalue().splitlines()[-1])["status"] is None


def test_json_of_every_process(tmp_path: Path) -> None:
    """The configuration as vLLM's processes and uvicorn apply it."""
    file = tmp_path / "logging.json"
    file.write_text(json.dumps(logging_config("json", "INFO", "INFO")))
    script = (
        "import json, logging, logging.config, sys\n"
        "logging.config.dictConfig(json.load(open(sys.argv[1])))\n"
        "logging.getLogger('vllm.x').info('two\\nlines')\n"
        "logging.getLogger('uvicorn.error').info('up', extra={'color_message': '\\x1b[1mup'})\n"
        "logging.getLogger('elsewhere').info('not this')\n"
        "logging.getLogger('elsewhere').warning('but this')\n"
        "try:\n    1 / 0\n"
        "except ZeroDivisionError:\n    logging.getLogger('foldserve.y').exception('failed')\n"
    )
    run = subprocess.run([sys.executable, "-c", script, file], capture_output=True, text=True, check=True)
    said = [json.loads(line) for line in run.stdout.splitlines()]
    assert [line["message"] for line in said] == ["two\nlines", "up", "but this", "failed"]
    assert [line["level"] for line in said] == ["INFO", "INFO", "WARNING", "ERROR"]
    assert "ZeroDivisionError" in said[-1]["exc_info"]
    assert all(line["timestamp"] and line["request_id"] is None and "color_message" not in line for line in said)
    assert run.stderr == ""


def test_the_configuration_lives_as_long_as_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with shared_logging_config("json", "DEBUG", verbose=False, own=False):
        file = Path(os.environ[VARIABLE])
        assert json.loads(file.read_text())["loggers"]["vllm"]["level"] == "DEBUG"
    assert VARIABLE not in os.environ
    assert not file.exists()
    with shared_logging_config("text", "INFO", verbose=False, own=True):
        assert VARIABLE not in os.environ


@pytest.mark.parametrize(
    ("log_format", "level", "verbose", "ours", "vllms"),
    [
        ("text", None, False, "INFO", "WARNING"),
        ("text", None, True, "INFO", "INFO"),
        ("text", "DEBUG", False, "DEBUG", "DEBUG"),
        ("text", "ERROR", True, "ERROR", "ERROR"),
        ("json", None, False, "INFO", "INFO"),
        ("json", "WARNING", False, "WARNING", "WARNING"),
    ],
)
def test_whose_lines_are_shown(
    log_format: str, level: str | None, verbose: bool, ours: str, vllms: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with shared_logging_config(log_format, level, verbose=verbose, own=False):
        loggers = json.loads(Path(os.environ[VARIABLE]).read_text())["loggers"]
    assert {name: logger["level"] for name, logger in loggers.items()} == {
        "foldserve": ours,
        STARTUP: ours,
        "vllm": vllms,
        "uvicorn": vllms,
    }


def test_vllms_warnings_are_shown_but_for_those_about_our_choices(tmp_path: Path) -> None:
    file = tmp_path / "logging.json"
    file.write_text(json.dumps(logging_config("text", "INFO", "WARNING")))
    script = (
        "import logging\n"
        "from vllm.config.logging import LoggingConfig\n"
        "from vllm.logger import configure_logging\n"
        "configure_logging(LoggingConfig())\n"  # as vLLM does, by the environment
        "logging.getLogger('uvicorn.error').setLevel('INFO')\n"  # as uvicorn does
        "logging.getLogger('uvicorn.error').info('started')\n"
        "vllm = logging.getLogger('vllm.config')\n"
        "vllm.info('a route')\n"
        "vllm.warning('Enforce eager set, disabling %s', 'much')\n"
        "vllm.error('Enforce eager set, disabling failed')\n"
        "vllm.warning('no tcmalloc')\n"
        "try:\n    raise OSError('Too many open files')\n"
        "except OSError:\n    vllm.exception('Error accepting a connection')\n"
    )
    env = {**os.environ, VARIABLE: str(file)}
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env).stdout
    assert [line.rpartition("] ")[2] for line in said.splitlines()] == [
        "Enforce eager set, disabling failed",
        "no tcmalloc",
        "Error accepting a connection: Too many open files",
    ]


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_what_is_told_at_start(log_format: str, tmp_path: Path) -> None:
    file = tmp_path / "logging.json"
    file.write_text(json.dumps(logging_config(log_format, "INFO", "WARNING")))
    script = (
        "import json, logging.config, sys\n"
        "logging.config.dictConfig(json.load(open(sys.argv[1])))\n"
        "facts = {'model': 'demo', 'withdrawal': 'off'}\n"
        f"logging.getLogger('{STARTUP}').info('version %s', 1, extra={{'facts': facts}})\n"
    )
    said = subprocess.run([sys.executable, "-c", script, file], capture_output=True, text=True, check=True).stdout
    if log_format == "text":
        assert said == "foldserve: version 1\n  model       demo\n  withdrawal  off\n"
    else:
        line = json.loads(said)
        assert (line["message"], line["facts"]) == ("version 1", {"model": "demo", "withdrawal": "off"})
