"""Whether one key can find out which pictures another has sent: `python -m foldserve.loadtest.micro.image_oracle`.

Alice sends a picture. Then Bob sends, at random, the same one or a new one, and guesses which from the time of his
answer. The table also shows the cache hits that an operator sees on `/metrics`. As a control Alice takes Bob's place:
her pictures are in her caches, so if she can't tell them apart, this machine is too noisy to say anything about Bob.

Further options go to the server, which serves the demo model with two API processes.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from math import inf, sqrt
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import httpx

from foldserve.loadtest.images import Images
from foldserve.loadtest.metrics import read
from foldserve.loadtest.servers import LocalServer

_HITS, _QUERIES = "vllm:mm_cache_hits_total", "vllm:mm_cache_queries_total"
_WATCHER = "watcher"
_TOLD_WITHIN_S = 10
_TIMEOUT_S = 120
_WARM_UP = 10  # tries that do not count

Ask = Callable[[str], float]
"""Sends a picture by its URL and returns the seconds until the answer."""


@dataclass(frozen=True, slots=True)
class Guess:
    """One guess.

    Attributes:
        seen: whether the picture is the one that Alice has just sent.
        seconds: time until the guesser's answer.
        hits: hits of the image cache during that request.
    """

    seen: bool
    seconds: float
    hits: float


@dataclass(frozen=True, slots=True)
class GuesserResult:
    """Results of a guesser. Guessing at random gives a `right_share` of 0.5, +- `chance_within` (95 %)."""

    tries: int
    seen_ms: float
    fresh_ms: float
    right_share: float
    chance_within: float
    hits_seen: float
    hits_fresh: float

    @classmethod
    def of(cls, tries: Sequence[Guess]) -> GuesserResult:
        seen, fresh = ([each for each in tries if each.seen is kind] for kind in (True, False))
        return cls(
            tries=len(tries),
            seen_ms=round(1e3 * median(each.seconds for each in seen), 1),
            fresh_ms=round(1e3 * median(each.seconds for each in fresh), 1),
            right_share=round(right_share(tries), 3),
            chance_within=round(1.96 * sqrt(0.25 / len(tries)), 3),
            hits_seen=sum(each.hits for each in seen),
            hits_fresh=sum(each.hits for each in fresh),
        )


def threshold(tries: Sequence[Guess]) -> float:
    """The time limit for guessing "seen" that guesses most of `tries` right."""
    choices = sorted({-inf, *(each.seconds for each in tries), inf})
    return max(choices, key=lambda seconds: sum((each.seconds < seconds) == each.seen for each in tries))


def right_share(tries: Sequence[Guess]) -> float:
    """Share of right guesses; each half of the tries is guessed with the threshold of the other half."""
    right = 0
    for half, other in ((tries[::2], tries[1::2]), (tries[1::2], tries[::2])):
        at = threshold(other)
        right += sum((each.seconds < at) == each.seen for each in half)
    return right / len(tries)


def measure(
    alice: Ask, guesser: Ask, hits: Callable[[], float], pictures: Iterator[str], tries: int, times: int
) -> list[Guess]:
    """Runs the tries in random order, half of them with a picture of Alice's.

    Args:
        hits: returns the hits of the image cache once all requests so far are counted.
        pictures: URLs of new pictures.
        times: how often Alice sends each picture.
    """
    coins = [number % 2 == 0 for number in range(tries)]
    random.Random(0).shuffle(coins)
    found = []
    for seen in coins:
        hers, own = next(pictures), next(pictures)  # made in advance: a pause before the guess would give it away
        for _ in range(times):
            alice(hers)
        before = hits()
        seconds = guesser(hers if seen else own)
        found.append(Guess(seen, seconds, hits() - before))
    return found


class _GuardedServer:
    """A server with a client for each key."""

    def __init__(self, options: Sequence[str], folder: Path) -> None:
        file = folder / "keys.toml"
        scopes = {"alice": "api", "bob": "api", _WATCHER: "metrics"}
        keys = {name: _add_key(file, name, scope) for name, scope in scopes.items()}
        self._local = LocalServer(
            "foldserve", ["--api-keys", str(file), "--api-server-count", "2", *options], folder / "log"
        )
        each_anew = httpx.Limits(max_keepalive_connections=0)  # either API process may take the next request
        self._clients = {
            name: httpx.Client(
                base_url=self._local.url,
                headers={"Authorization": f"Bearer {key}"},
                limits=each_anew,
                timeout=_TIMEOUT_S,
            )
            for name, key in keys.items()
        }
        self._asked = 0

    def stop(self) -> None:
        for client in self._clients.values():
            client.close()
        self._local.stop()

    def ask(self, name: str) -> Ask:
        def ask(url: str) -> float:
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
            body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1, "temperature": 0}
            self._asked += 1
            began = time.perf_counter()
            self._clients[name].post("/v1/chat/completions", json=body).raise_for_status()
            return time.perf_counter() - began

        return ask

    def hits(self) -> float:
        end = time.monotonic() + _TOLD_WITHIN_S
        while True:
            counters, _ = read(self._clients[_WATCHER].get("/metrics").raise_for_status().text)
            if counters.get(_QUERIES, 0) >= self._asked:
                return counters.get(_HITS, 0)
            if time.monotonic() > end:
                raise RuntimeError(f"{self._asked} pictures were sent, and {counters.get(_QUERIES, 0):g} counted")
            time.sleep(0.02)


def _add_key(file: Path, name: str, scope: str) -> str:
    """Makes a key as an operator does, adds it to the key file and returns it."""
    command = [sys.executable, "-m", "foldserve.server.cli", "hash-key", name, "--scope", scope]
    made = subprocess.run(command, capture_output=True, text=True, check=True)
    with file.open("a") as entries:
        entries.write(made.stdout)
    return made.stderr.split()[-1]


def render(found: dict[str, GuesserResult]) -> str:
    """A Markdown table with one row per guesser."""
    lines = [
        "| who guesses | tries | Alice's | own | right by time | chance (95 %) | cache hits: Alice's, own |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        low, high = 0.5 - row.chance_within, 0.5 + row.chance_within
        lines.append(
            f"| {name} | {row.tries} | {row.seen_ms} ms | {row.fresh_ms} ms | {row.right_share:.0%} "
            f"| {low:.0%} to {high:.0%} | {row.hits_seen:g}, {row.hits_fresh:g} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--tries", type=int, default=120)
    parser.add_argument("--times", type=int, default=4, help="that Alice sends a picture: either process may take it")
    parser.add_argument("--side", type=int, default=672, help="pixels along a side of a picture")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every try there")
    args, options = parser.parse_known_args(argv)
    pictures = map(Images(args.side).url, count())
    tries: dict[str, list[Guess]] = {}
    with TemporaryDirectory(prefix="foldserve-oracle-") as folder:
        server = _GuardedServer(options, Path(folder))
        try:
            for name, number in (("alice", _WARM_UP), ("bob", args.tries), ("alice", args.tries)):
                tries[name] = measure(server.ask("alice"), server.ask(name), server.hits, pictures, number, args.times)
        finally:
            server.stop()
    print(render({"Bob": GuesserResult.of(tries["bob"]), "Alice, as a control": GuesserResult.of(tries["alice"])}))
    if args.json:
        args.json.write_text(json.dumps({name: [asdict(each) for each in of] for name, of in tries.items()}) + "\n")


if __name__ == "__main__":
    main()
