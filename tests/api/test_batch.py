"""`foldserve batch` as a user starts it, beside a server of the same checkpoint: killed, hung, resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image

from tests.api.live import CHAT, START_LIMIT_S, chat
from tests.images import data_uri, jpeg, photo

RATIOS = (0, 0.25, 0.5, 0.75, 0.9)
MODEL_OPTIONS = (
    "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager", "--served-model-name", "tiny",
    "--kv-cache-memory-bytes", str(64 << 20), "--mm-processor-cache-gb", "0.1", "--withdraw-layer", "2",
    "--hf-overrides", '{"text_config": {"max_position_embeddings": 1200}}', "--max-image-mb", "2",
)  # fmt: skip


def image(seed: int) -> dict[str, Any]:
    return part(data_uri(photo(seed)))


def part(url: str, **fields: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url} | fields}


def bodies(folder: Path) -> dict[str, dict[str, Any]]:
    """Chats by `custom_id`."""
    (folder / "photo.jpg").write_bytes(jpeg(photo(3)))
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 24}
    return {
        **{f"text-{i}": chat(f"say {i}", **options) for i in range(4)},
        **{f"image-{i}": chat("what?", image(i), reduction_ratio=RATIOS[i % 5], **options) for i in range(20)},
        "withdrawn": chat("what?", image(1), reduction={"ratio": 0.5, "withdraw": True}, **options),
        "low": chat(
            "what?", {"type": "image_url", "image_url": {"url": data_uri(photo(2)), "detail": "low"}}, **options
        ),
        "file": chat("what?", part(f"file://{folder}/photo.jpg"), reduction_ratio=0.5, **options),
        "outside": chat("what?", part("file:///etc/hostname")),
        "large": chat("what?", part(data_uri(Image.new("RGB", (8200, 5000))))),
        "ratio": chat("what?", image(1), reduction_ratio=1.5),
        "model": chat("hello", model="other"),
    }


def command(folder: Path, model: Path, *options: str) -> list[str]:
    files = ["-i", str(folder / "in.jsonl"), "-o", str(folder / "out.jsonl")]
    paths = ["--allowed-local-media-path", str(folder), "--concurrency", "2"]
    return [sys.executable, "-m", "foldserve.server.cli", "batch", str(model), *files, *paths, *MODEL_OPTIONS, *options]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("batch")
    requests = bodies(folder)
    envelope = {"method": "POST", "url": CHAT}
    lines = [json.dumps({"custom_id": name, "body": body} | envelope) for name, body in requests.items()]
    lines[2:2] = [
        "",
        '{"custom_id": "broken',
        json.dumps({"custom_id": "other", "body": {}} | envelope | {"url": "/v1/x"}),
    ]
    (folder / "in.jsonl").write_text("\n".join(lines))
    return folder, requests


@pytest.fixture(scope="module")
def found(asked: tuple[Path, dict[str, dict[str, Any]]], tiny_llava: Path) -> dict[str | None, dict[str, Any]]:
    """Results by `custom_id`: of a run that was killed, one whose engine hung, and one that came to the end."""
    folder, requests = asked
    output = folder / "out.jsonl"
    with _started(folder, tiny_llava, "--overwrite", lines=5) as killed:
        killed.kill()
    done = _whole_lines(output).count(b"\n")
    with _started(folder, tiny_llava, "--resume", "--engine-timeout", "5", lines=done + 3) as hung:
        _engine(hung).send_signal(signal.SIGSTOP)
        assert hung.wait(START_LIMIT_S) == 1
    said = (folder / "log").read_text()
    assert said.rstrip().endswith(
        "foldserve batch: error: the engine has work and gave no output for 5 s: what is written stays, and --resume "
        "answers the rest"
    ), said
    whole = _whole_lines(output)
    assert done + 3 <= whole.count(b"\n") < len(requests), said
    last = subprocess.run(command(folder, tiny_llava, "--resume"), capture_output=True, text=True, check=False)
    assert last.returncode == 0, last.stdout + last.stderr
    assert "33 lines answered, 6 of them with an error, " in last.stderr, last.stderr
    assert output.read_bytes().startswith(whole)
    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(results) == len(requests) + 2
    return {result["custom_id"]: result for result in results}


@contextmanager
def _started(folder: Path, model: Path, *options: str, lines: int) -> Iterator[subprocess.Popen[bytes]]:
    """A run that has written so many lines; at the end nothing of it is left."""
    with (folder / "log").open("w") as log:
        run = subprocess.Popen(command(folder, model, *options), stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_for_lines(run, folder / "out.jsonl", lines)
        processes = psutil.Process(run.pid).children(recursive=True)
        yield run
    finally:
        run.kill()
        run.wait()
    assert len(psutil.wait_procs(processes, 60)[1]) == 0, "the engine outlived the run"


def _engine(run: subprocess.Popen[bytes]) -> psutil.Process:
    children = psutil.Process(run.pid).children(recursive=True)
    return next(child for child in children if "EngineCore" in " ".join(child.cmdline()))


def _whole_lines(output: Path) -> bytes:
    content = output.read_bytes()
    return content[: content.rfind(b"\n") + 1]


def _wait_for_lines(process: subprocess.Popen[bytes], output: Path, number: int) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while not output.exists() or output.read_bytes().count(b"\n") < number:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_each_line_is_answered_once(
    found: Mapping[str | None, dict[str, Any]], asked: tuple[Path, dict[str, dict[str, Any]]]
) -> None:
    assert found.keys() == {*asked[1], None, "other"}


def test_answers_are_those_of_the_server(
    found: Mapping[str | None, dict[str, Any]], asked: tuple[Path, dict[str, dict[str, Any]]], server_url: str
) -> None:
    """Text, usage and refusals, with `vision_tokens`; only of files the server knows nothing."""
    _, requests = asked
    for name, body in requests.items():
        if name in ("file", "outside"):
            continue
        over_http = httpx.post(f"{server_url}{CHAT}", json=body, timeout=START_LIMIT_S)
        response = found[name]["response"]
        assert response["status_code"] == over_http.status_code, name
        assert found[name]["error"] is None
        theirs = over_http.json()
        for part in ("choices", "usage") if over_http.status_code == 200 else ("error",):
            assert response["body"][part] == theirs[part], name


def test_results_say_what_was_applied(found: Mapping[str | None, dict[str, Any]]) -> None:
    """What the method's counts are, without a server to compare with."""
    for i in range(20):
        removed = int(144 * RATIOS[i % 5])
        vision = found[f"image-{i}"]["response"]["body"]["usage"]["vision_tokens"]
        assert (vision["encoded"], vision["kept"]) == (144, 144 - removed)
    assert found["withdrawn"]["response"]["body"]["usage"]["vision_tokens"]["withdrawn"] == 72
    assert "vision_tokens" not in found["text-0"]["response"]["body"]["usage"]


def test_a_file_is_read_under_the_folder_only(found: Mapping[str | None, dict[str, Any]]) -> None:
    assert found["file"]["response"]["body"]["usage"]["vision_tokens"]["kept"] == 72
    refused = found["outside"]["response"]
    assert (refused["status_code"], refused["body"]["error"]["code"]) == (400, "refused_image_url")


def test_lines_that_are_no_requests(found: Mapping[str | None, dict[str, Any]]) -> None:
    assert found[None]["response"] is None and found[None]["id"] == "batch_req_4"
    assert found[None]["error"]["message"].startswith("the line is not valid JSON")
    assert found["other"]["error"]["code"] == "unsupported_route"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["-i", "{0}/in.jsonl"], "give both files"),
        (["-i", "{0}/none", "-o", "{0}/x"], "--input must be a file"),
        (["-i", "{0}/in.jsonl", "-o", "{0}/in.jsonl"], "--output is the input"),
        (["-i", "{0}/in.jsonl", "-o", "{0}/x", "--concurrency", "0"], "--concurrency must be at least 1, not 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_run_that_can_not_be_meant(
    options: list[str], says: str, asked: tuple[Path, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    from foldserve.server import cli

    with pytest.raises(SystemExit) as exit_:
        cli.main(["batch", *(option.format(asked[0]) for option in options)])
    assert exit_.value.code == 2
    assert says in capsys.readouterr().err
    assert not os.path.exists(asked[0] / "x")
