"""Sends requests with `vllm bench serve`, the client that vLLM's own benchmarks use.

The command runs in a child process, forked from one that has already imported its modules: importing takes longer
than many a block. Without a tokenizer, the dataset `custom` takes whole lists of messages, and the length of answers
comes from the extra body.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from multiprocessing.context import ForkServerContext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from foldserve.loadtest.grid import Load
from foldserve.loadtest.record import SentRequests
from foldserve.loadtest.workloads import Messages

CHAT = "/v1/chat/completions"
_COMMAND = "vllm.entrypoints.cli.main"
_LOADED = [_COMMAND, "vllm.entrypoints.cli.benchmark.main", "vllm.benchmarks.serve"]


def preload() -> None:
    """Imports the client's modules, so that the first `send` does not wait for them."""
    idle = _fork_server().Process(daemon=True)
    idle.start()
    idle.join()


def send(
    url: str, model: str, chats: Sequence[Messages], body: dict[str, Any], load: Load, burstiness: float, seed: int
) -> SentRequests:
    """Sends every chat once, in order.

    Args:
        body: further fields of every request.

    Raises:
        RuntimeError: the command failed, or no request was answered.
    """
    with TemporaryDirectory(prefix="foldserve-loadtest-") as name:
        folder = Path(name)
        (folder / "chats.jsonl").write_text("".join(json.dumps({"prompt": chat}) + "\n" for chat in chats))
        options = [*arguments(url, model, len(chats), body, load, burstiness, seed), "--result-dir", name]
        options += ["--dataset-path", str(folder / "chats.jsonl"), "--result-filename", "result.json"]
        log = folder / "log"
        client = _fork_server().Process(target=_serve, args=(options, log), daemon=True)
        client.start()
        client.join()
        if client.exitcode != 0:
            said = log.read_text()[-4000:] if log.is_file() else ""
            raise RuntimeError(f"`vllm bench serve` ended with {client.exitcode}:\n{said}")
        return parse(json.loads((folder / "result.json").read_text()))


def _fork_server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_LOADED)
    return context


def _serve(options: Sequence[str], log: Path) -> None:
    """Runs `vllm bench serve` in this process, which ends with it."""
    with log.open("w") as out:
        for stream in (1, 2):
            os.dup2(out.fileno(), stream)
    sys.argv = ["vllm", "bench", "serve", *options]
    import_module(_COMMAND).main()


def arguments(
    url: str, model: str, requests: int, body: dict[str, Any], load: Load, burstiness: float, seed: int
) -> list[str]:
    """The command's arguments, without those for files."""
    options = ["--backend", "openai-chat", "--base-url", url, "--endpoint", CHAT, "--model", model]
    options += ["--dataset-name", "custom", "--skip-tokenizer-init", "--disable-shuffle", "--no-oversample"]
    options += ["--num-prompts", str(requests), "--extra-body", json.dumps(body), "--seed", str(seed)]
    options += ["--save-result", "--save-detailed", "--disable-tqdm"]
    if load.concurrency is not None:
        return [*options, "--max-concurrency", str(load.concurrency)]
    return [*options, "--request-rate", str(load.rate), "--burstiness", str(burstiness)]


def parse(result: dict[str, Any]) -> SentRequests:
    """Reads the command's result file; RuntimeError if no request was answered."""
    errors = [error.strip() for error in result["errors"] if error]
    good = [number for number, error in enumerate(result["errors"]) if not error]
    if not good:
        raise RuntimeError(f"no request was answered; the first error was: {errors[0]}")

    def of_good(name: str) -> list[Any]:
        return [result[name][number] for number in good]

    return SentRequests(
        start_s=of_good("start_times"),
        ttft_s=of_good("ttfts"),
        e2e_s=of_good("latencies"),
        itl_s=of_good("itls"),
        prompt_tokens=of_good("input_lens"),
        output_tokens=of_good("output_lens"),
        errors=errors,
    )
