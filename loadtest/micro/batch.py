"""Lines/s of `foldserve batch` beside requests/s over HTTP: `python -m foldserve.loadtest.micro.batch MODEL`.

Both answer the same chats with as many in flight, and are timed from the end of the last answer of the warm-up to the
end of the last of the block, so that no start counts. Over HTTP, the client is the load test's, a process of its own.
The server starts anew for every round, the batch for every block. Any further option goes to both.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from foldserve.loadtest import bench
from foldserve.loadtest.grid import Load, Variant
from foldserve.loadtest.images import Images
from foldserve.loadtest.micro.pairs import ratio
from foldserve.loadtest.servers import LocalServer
from foldserve.loadtest.workloads import WORKLOADS, Messages, SourceFactory

_LOOK_S = 0.005  # between two looks at the batch's output

Rates = dict[float, float]
"""Requests/s by ratio."""


class Bench:
    """Measures one round of either side; `args` are those of the command, `options` the engine's."""

    def __init__(self, args: Namespace, options: Sequence[str], folder: Path) -> None:
        self._args, self._folder = args, folder
        self._command = [args.model, *options]
        self._sources = SourceFactory(Images(args.image_size), words=48)

    def http(self, round: int) -> Rates:
        server = LocalServer("foldserve", self._command, self._folder / "server.log")
        try:
            bench.preload()
            model = str(httpx.get(f"{server.url}/v1/models").raise_for_status().json()["data"][0]["id"])
            return {ratio: self._send(server.url, model, ratio, round) for ratio in self._args.ratios}
        finally:
            server.stop()

    def batch(self, round: int) -> Rates:
        return {ratio: self._answer(ratio, round) for ratio in self._args.ratios}

    def _send(self, url: str, model: str, ratio: float, round: int) -> float:
        load = Load(concurrency=self._args.concurrency)
        sent = bench.send(url, model, self._chats(ratio, round), self._body(ratio), load, burstiness=1, seed=0)
        if sent.errors:
            raise RuntimeError(f"{len(sent.errors)} requests failed; the first error was: {sent.errors[0]}")
        return rate([start + took for start, took in zip(sent.start_s, sent.e2e_s, strict=True)], self._args.warm_up)

    def _answer(self, ratio: float, round: int) -> float:
        requests, results, log = (self._folder / name for name in ("in.jsonl", "out.jsonl", "batch.log"))
        requests.write_text(lines(self._chats(ratio, round), self._body(ratio)))
        results.write_bytes(b"")
        command = [sys.executable, "-m", "foldserve.server.cli", "batch", *self._command, "--overwrite"]
        command += ["-i", str(requests), "-o", str(results), "--concurrency", str(self._args.concurrency)]
        with log.open("w") as out:
            done = watch(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT), results)
        answers = [json.loads(line)["response"] for line in results.read_text().splitlines()]
        if len(answers) != self._count or any(answer is None or answer["status_code"] != 200 for answer in answers):
            raise RuntimeError(f"not all lines were answered:\n{log.read_text()[-4000:]}")
        return rate(done, self._args.warm_up)

    @property
    def _count(self) -> int:
        return int(self._args.warm_up + self._args.requests)

    def _chats(self, ratio: float, round: int) -> list[Messages]:
        source = self._sources.source(f"ratio {ratio:g}, round {round}")
        return WORKLOADS["chat"].make(source, self._count)

    def _body(self, ratio: float) -> dict[str, Any]:
        fields = Variant(method="folder" if ratio else None, ratio=ratio).body()
        return fields | {"temperature": 0, "ignore_eos": True, "max_completion_tokens": self._args.output_tokens}


def lines(chats: Sequence[Messages], body: Mapping[str, Any]) -> str:
    """The chats as a batch file."""
    envelope = {"method": "POST", "url": bench.CHAT}
    return "".join(
        json.dumps({"custom_id": str(number), **envelope, "body": {"messages": chat, **body}}) + "\n"
        for number, chat in enumerate(chats)
    )


def watch(run: subprocess.Popen[bytes], results: Path) -> list[float]:
    """When each line of a run's output was there, by `time.monotonic`."""
    done: list[float] = []
    with results.open("rb") as file:
        has_ended = False
        while not has_ended:
            has_ended = run.poll() is not None  # before the last look
            done += [time.monotonic()] * file.read().count(b"\n")
            time.sleep(_LOOK_S)
    return done


def rate(done: Sequence[float], warm_up: int) -> float:
    """Answers/s after the first `warm_up`, from the times at which answers were complete."""
    ordered = sorted(done)
    return (len(ordered) - warm_up) / (ordered[-1] - ordered[warm_up - 1])


def measure(bench: Bench, rounds: int) -> list[tuple[Rates, Rates]]:
    """(batch, HTTP) of each round, in the order ABBA."""
    found = []
    for round in range(rounds):
        http = None if round % 2 else bench.http(round)
        batch = bench.batch(round)
        found.append((batch, bench.http(round) if http is None else http))
        print(f"round {round}: batch {found[-1][0]}, HTTP {found[-1][1]}", flush=True)
    return found


def table(rounds: Sequence[tuple[Rates, Rates]]) -> str:
    """Medians of the rounds, in Markdown."""
    rows = ["| ratio | `foldserve batch`, lines/s | over HTTP, requests/s | batch / HTTP |", "|---|---|---|---|"]
    for each in rounds[0][0]:
        batch, http = ([side[each] for side in sides] for sides in zip(*rounds, strict=True))
        compared = ratio(list(zip(batch, http, strict=True)))
        rows.append(f"| {each:g} | {median(batch):.1f} | {median(http):.1f} | {compared} |")
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0, 0.25, 0.5, 0.75, 0.9], metavar="R")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=320, help="of a block")
    parser.add_argument("--warm-up", type=int, default=64, help="requests before those, at least one")
    parser.add_argument("--concurrency", type=int, default=32, help="requests in flight")
    parser.add_argument("--output-tokens", type=int, default=16, help="of each answer")
    parser.add_argument("--image-size", type=int, default=336, metavar="PX")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rates of all rounds there")
    args, options = parser.parse_known_args(argv)
    with TemporaryDirectory(prefix="foldserve-batch-") as folder:
        rounds = measure(Bench(args, options, Path(folder)), args.rounds)
    print(table(rounds))
    if args.json:
        args.json.write_text(json.dumps([{"batch": batch, "http": http} for batch, http in rounds], indent=1) + "\n")


if __name__ == "__main__":
    main()
