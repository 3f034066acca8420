"""Measures every block that the journal lacks."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import httpx
from tqdm import tqdm

from foldserve.loadtest import bench, keys
from foldserve.loadtest.grid import Block, Load, Variant
from foldserve.loadtest.images import Images
from foldserve.loadtest.metrics import MetricsWatch
from foldserve.loadtest.options import LoadTestOptions
from foldserve.loadtest.record import BlockJournal, Record, SentRequests
from foldserve.loadtest.servers import Fleet, Server
from foldserve.loadtest.trace import TraceLine, read_trace, replay
from foldserve.loadtest.workloads import WORKLOADS, Messages, SourceFactory

_WARM_UP_TIMEOUT_S = 600
_WARM_UP_TOKENS = 4


class Sender(Protocol):
    """Sends the requests of one block."""

    def __call__(
        self, url: str, model: str, chats: Sequence[Messages], body: dict[str, Any], block: Block
    ) -> SentRequests: ...


class BlockRunner:
    """Measures blocks on the servers of a fleet; `send` is by default `vllm bench serve`, or the replay of a trace."""

    def __init__(self, options: LoadTestOptions, fleet: Fleet, send: Sender | None = None) -> None:
        self._options, self._fleet = options, fleet
        self._sources = SourceFactory(Images(options.image_size, options.images, options.repeat_images), options.words)
        self._trace: list[TraceLine] = read_trace(options.trace) if options.trace else []
        self._send = send or (self._replay if self._trace else self._bench)
        self._models: dict[str, str] = {}

    def measure(self, blocks: Sequence[Block], variants: Sequence[Variant], journal: BlockJournal) -> None:
        """Fills the journal, with a progress bar over all requests.

        Raises:
            RuntimeError: a server does not start or does not answer.
            ValueError: a server refuses a variant.
        """
        total = sum(self._count(block.point.load) for block in blocks)
        bar = tqdm(total=total, unit="req", desc="foldserve loadtest")
        started_for = None
        for block in blocks:
            if block.key not in journal:
                bar.set_postfix_str(block.key)
                if self._options.restart and block.round != started_for:
                    self._fleet.stop()
                    started_for = block.round
                server, is_new = self._fleet.get(block.point.variant.server)
                if is_new or server.url not in self._models:
                    self._warm_up(server, [v for v in variants if v.server == block.point.variant.server])
                journal.add(block.key, self._one(server, block))
            bar.update(self._count(block.point.load))
        bar.close()

    def _one(self, server: Server, block: Block) -> Record:
        chats = self._chats(block.key, self._count(block.point.load))
        body = block.point.variant.body() | self._answer()
        cpu = server.cpu_s()
        with MetricsWatch(server.url) as watch:
            sent = self._send(server.url, self._models[server.url], chats, body, block)
        spent = {kind: after - cpu[kind] for kind, after in server.cpu_s().items()}
        return Record(sent=sent, counters=watch.counters, gauges=watch.gauges, cpu_s=spent)

    def _count(self, load: Load) -> int:
        """Number of requests in a block."""
        return min(load.requests, len(self._trace)) if self._trace else load.requests

    def _answer(self) -> dict[str, Any]:
        """Request fields for a greedy answer of fixed length; a trace has its own lengths."""
        length = {} if self._trace else {"max_completion_tokens": self._options.answer_tokens}
        return {"temperature": 0, "ignore_eos": True} | length

    def _chats(self, block: str, count: int) -> list[Messages]:
        source = self._sources.source(block)
        if self._trace:
            return [line.chat(source) for line in self._trace[:count]]
        return WORKLOADS[self._options.workload].make(source, count)

    def _bench(
        self, url: str, model: str, chats: Sequence[Messages], body: dict[str, Any], block: Block
    ) -> SentRequests:
        return bench.send(url, model, chats, body, block.point.load, self._options.burstiness, self._options.seed)

    def _replay(
        self, url: str, model: str, chats: Sequence[Messages], body: dict[str, Any], block: Block
    ) -> SentRequests:
        assert block.point.load.speed is not None
        return replay(url, model, self._trace[: len(chats)], chats, body, block.point.load.speed)

    def _warm_up(self, server: Server, variants: Sequence[Variant]) -> None:
        """Sends requests of every variant, so that a refusal comes before anything is measured."""
        if self._send == self._bench:
            bench.preload()
        with httpx.Client(base_url=server.url, timeout=_WARM_UP_TIMEOUT_S, headers=keys.for_chats()) as client:
            model = str(client.get("/v1/models").raise_for_status().json()["data"][0]["id"])
            for variant in variants:
                fields = variant.body() | self._answer() | {"model": model, "max_completion_tokens": _WARM_UP_TOKENS}
                bodies = [
                    {"messages": chat} | fields
                    for chat in self._chats(f"warm-up, {variant.label}", self._options.warm_up)
                ]
                for answer in _post_at_once(client, bodies):
                    if answer.status_code != 200:
                        raise ValueError(f"{server.url} refuses {variant.label}: {answer.text[:1000]}")
        self._models[server.url] = model


def _post_at_once(client: httpx.Client, bodies: Sequence[dict[str, Any]]) -> list[httpx.Response]:
    with ThreadPoolExecutor(max(1, len(bodies))) as pool:
        return list(pool.map(lambda body: client.post(bench.CHAT, json=body), bodies))
