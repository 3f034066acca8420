"""Runs each engine in its own process, with a fixed number of requests in flight."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from foldserve.loadtest.micro.openvino.engines import Contender, Engine, Pixels


@dataclass(frozen=True, slots=True)
class Load:
    """A number of requests at a concurrency; `seed` makes their images new."""

    requests: int
    concurrency: int
    tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class LoadRun:
    """Results of a load.

    Attributes:
        ttft_s: for each request, from adding it to the end of the step with its first token.
        kv_bytes: most bytes of KV blocks in use after a step.
    """

    requests_per_s: float
    ttft_s: tuple[float, ...]
    kv_bytes: int


class RemoteEngine:
    """An engine in another process; raises RuntimeError with its message if it fails."""

    def __init__(self, start: Callable[[], Engine]) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit threads
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, start), daemon=True)
        self._process.start()
        theirs.close()
        self._answer()

    def measure(self, contender: Contender, load: Load) -> LoadRun:
        self._pipe.send((contender, load))
        answer: LoadRun = self._answer()
        return answer

    def stop(self) -> None:
        self._pipe.close()
        self._process.join()

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError("an engine's process ended: its output says why") from None
        if isinstance(answer, Exception):
            raise RuntimeError(f"an engine failed: {answer!r}") from answer
        return answer


def measure(engine: Engine, contender: Contender, load: Load) -> LoadRun:
    """Keeps `concurrency` requests running until all are answered."""
    engine.prepare(contender)
    images = [noise(contender.px, (load.seed, number)) for number in range(load.requests)]
    added: dict[int, float] = {}
    first: dict[int, float] = {}
    running: set[int] = set()
    most = 0
    start = time.perf_counter()
    while len(added) < load.requests or running:
        while len(running) < load.concurrency and len(added) < load.requests:
            number = len(added)
            added[number] = time.perf_counter()
            engine.add(number, images[number], load.tokens)
            running.add(number)
        got = engine.step()
        now = time.perf_counter()
        most = max(most, engine.kv_bytes())
        for number, tokens in got:
            first.setdefault(number, now)
            if tokens >= load.tokens:
                running.remove(number)
    took = time.perf_counter() - start
    return LoadRun(load.requests / took, tuple(first[i] - added[i] for i in range(load.requests)), most)


def noise(px: int, seed: tuple[int, int]) -> Pixels:
    """A square image of noise."""
    return np.random.default_rng(seed).integers(0, 256, (px, px, 3), dtype=np.uint8)


def _serve(pipe: Connection, start: Callable[[], Engine]) -> None:
    try:
        engine = start()
        pipe.send(None)
        while True:
            pipe.send(measure(engine, *pipe.recv()))
    except EOFError:
        return
    except Exception as error:
        pipe.send(error)
        raise
