"""Mistakes in starting a server are found before anything is loaded, and reported in one line."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from foldserve.server.settings import Environment, Settings

PATIENCE_S = 300
WEIGHTS = "model.safetensors"


@pytest.fixture
def copy(tiny_llava: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may break."""
    return Path(shutil.copytree(tiny_llava, tmp_path / "model"))


def parsed(*argv: str) -> Namespace:
    from foldserve.server.api import launch

    return launch.serve_args(list(argv), Settings(), Environment.read({"HOME": "/"}), Path("/small"))


def refusal(*argv: str) -> str:
    from foldserve.server.api import preflight

    with pytest.raises(preflight.CannotStart) as refused:
        preflight.check(parsed(*argv))
    message = str(refused.value)
    assert "\n" not in message
    return message


def accepts(*argv: str) -> None:
    from foldserve.server.api import preflight

    preflight.check(parsed(*argv))


# ---- models


@pytest.mark.parametrize("model", ["/nowhere/model", "./model", "../model", "~/model", "a/b/c", "model/"])
def test_no_such_directory(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(model) == f"there is no directory {model}"
    assert refusal("--model", model) == f"there is no directory {model}"


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    assert refusal(str(tmp_path)) == f"{tmp_path} holds no model: config.json is missing"


@pytest.mark.parametrize("model", ["llava-hf/llava-1.5-7b-hf", "gpt2", "s3://bucket/a/b"])
def test_names_are_looked_up_by_vllm(model: str) -> None:
    accepts(model)


def test_a_model_is_accepted(tiny_llava: Path) -> None:
    accepts(str(tiny_llava))


# ---- weights

BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "seven bytes": lambda whole: whole[:7],
    "half a header": lambda whole: whole[:200],
    "half": lambda whole: whole[: len(whole) // 2],
    "one byte too few": lambda whole: whole[:-1],
    "one byte too many": lambda whole: whole + b"x",
    "a pointer of git-lfs": lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 13\n",
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_weights_are_named(how: str, copy: Path) -> None:
    file = copy / WEIGHTS
    file.write_bytes(BROKEN[how](file.read_bytes()))
    assert refusal(str(copy)).startswith(f"{file} is incomplete or damaged: ")


def test_no_weights(copy: Path) -> None:
    (copy / WEIGHTS).unlink()
    assert refusal(str(copy)).startswith(f"the weights in {copy} can't be loaded: ")
    accepts(str(copy), "--load-format", "dummy")


def test_parts_of_the_weights(copy: Path) -> None:
    """The index says which files there are; others may lie beside them."""
    parts = [copy / f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    (copy / WEIGHTS).rename(parts[0])
    shutil.copy(parts[0], parts[1])
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {f"weight {n}": part.name for n, part in enumerate(parts)}}))
    (copy / "unrelated.safetensors").write_text("")
    accepts(str(copy))
    parts[1].write_bytes(parts[1].read_bytes()[:-1])
    assert refusal(str(copy)).startswith(f"{parts[1]} is incomplete or damaged: ")
    parts[1].unlink()
    assert parts[1].name in refusal(str(copy))
    index.write_text("{")
    assert refusal(str(copy)).startswith(f"the weights in {copy} can't be loaded: ")


# ---- options


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--enable-auto-tool-choice"], "--enable-auto-tool-choice requires --tool-call-parser"),
        (["--enable-auto-tool-choice", "--tool-call-parser", "nosuch"], "invalid tool call parser: nosuch"),
        (["--reasoning-parser", "nosuch"], "invalid reasoning parser: nosuch"),
        (["--chat-template", "/nowhere/template.jinja"], "/nowhere/template.jinja"),
        (["--sse-keep-alive-interval", "-1"], "--sse-keep-alive-interval must be a non-negative integer"),
    ],
)
def test_options_that_vllm_looks_at_late(argv: list[str], message: str, tiny_llava: Path) -> None:
    assert message in refusal(str(tiny_llava), *argv)


# ---- the address


@contextmanager
def claimed(*argv: str) -> Iterator[None]:
    from foldserve.server.api import preflight

    with preflight.claimed_address(parsed("m", *argv)):
        yield


def address_refusal(*argv: str) -> str:
    from foldserve.server.api import preflight

    with pytest.raises(preflight.CannotStart) as refused, claimed(*argv):
        pass
    return str(refused.value)


@pytest.fixture
def taken() -> Iterator[socket.socket]:
    """A socket that is bound, as vLLM's while a model loads."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        yield taken


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_port_that_somebody_listens_on(processes: str, taken: socket.socket) -> None:
    taken.listen()
    port = str(taken.getsockname()[1])
    options = ["--host", "127.0.0.1", "--port", port, "--api-server-count", processes]
    assert address_refusal(*options) == f"can't listen on 127.0.0.1:{port}: Address already in use"
    assert address_refusal("--port", port) == f"can't listen on 0.0.0.0:{port}: Address already in use"
    taken.close()
    with claimed(*options):
        pass


def test_a_port_of_a_server_that_loads(taken: socket.socket) -> None:
    options = ["--host", "127.0.0.1", "--port", str(taken.getsockname()[1])]
    taken.close()
    with claimed(*options):
        assert "Address already in use" in address_refusal(*options)
        with claimed("--host", "127.0.0.2", *options[2:]):
            pass
    with claimed(*options):
        pass


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--port", "70000"], "port must be 0-65535"),
        (["--port", "-1"], "port must be 0-65535"),
        (["--host", "203.0.113.1"], "Cannot assign requested address"),
        (["--host", "no.such.host.invalid"], ""),
    ],
)
def test_addresses_that_can_not_be(options: list[str], why: str) -> None:
    assert address_refusal(*options).startswith("can't listen on ")
    assert why in address_refusal(*options)


# ---- the command


def serve(*argv: str, stdout: int = subprocess.PIPE) -> tuple[int, str, list[str]]:
    """Status, standard output, and the lines of standard error of a server that does not start."""
    env = {k: v for k, v in os.environ.items() if k not in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL")}
    command = [sys.executable, "-m", "foldserve.server.cli", "serve", *argv, "--dtype", "float32", "--enforce-eager"]
    done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, env=env, text=True, timeout=PATIENCE_S)
    return done.returncode, done.stdout or "", done.stderr.splitlines()


def test_a_mistake_ends_with_one_line(copy: Path) -> None:
    file = copy / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1000])
    status, out, err = serve(str(copy))
    assert status == 2
    assert err[-1].startswith(f"foldserve serve: error: {file} is incomplete or damaged: ")
    assert not any("Traceback" in line or "loading" in line for line in err)
    assert out == ""


def test_what_vllms_configuration_refuses_is_one_line(tiny_llava: Path) -> None:
    """It is made before the engine's process starts."""
    status, out, err = serve(str(tiny_llava), "--withdraw-layer", "99", "--max-model-len", "1024")
    assert status == 1
    assert err[-1] == "foldserve serve: error: --withdraw-layer must be an integer from 1 to 3 for this model, got 99"
    assert "Traceback" not in out + "".join(err)
    assert "EngineCore" not in out


def test_what_only_the_engine_can_know_comes_last(tiny_llava: Path) -> None:
    """With tracebacks above; nothing of it can be written to standard output, which each process says once."""
    full = os.open("/dev/full", os.O_WRONLY)
    options = ["--kv-cache-memory-bytes", "100000", "--max-model-len", "1024", "--port", "0"]
    status, _, err = serve(str(tiny_llava), *options, stdout=full)
    os.close(full)
    assert status == 1
    assert err[-1].startswith("foldserve serve: error: No available memory for the cache blocks.")
    assert "Logging error" not in "".join(err)
    assert sum("standard output can't be written" in line for line in err) <= 3
