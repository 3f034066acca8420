"""Requests with reduction, and a steady load of them."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.images import data_uri, photo

VISION_TOKENS = 144
"""Of the small model, per image."""
TIMEOUT_S = 300
PAUSE_S = 0.1
KINDS = ((0.0, False), (0.5, False), (0.9, False), (0.0, True), (0.5, True))
"""Ratio, and whether the rest is withdrawn."""


def body(
    ratio: float, seed: int, *, withdraw: bool = False, question: str = "What is this?", tokens: int = 4
) -> dict[str, Any]:
    """A chat about a picture of its own."""
    image = {"type": "image_url", "image_url": {"url": data_uri(photo(seed, 64, 48))}}
    content = [image, {"type": "text", "text": question}]
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": tokens,
        "reduction": {"ratio": ratio, "withdraw": withdraw},
    }


def ask(url: str, request: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json=request, timeout=TIMEOUT_S)


def is_right(request: dict[str, Any], answer: httpx.Response) -> bool:
    """The usage says what the request asked for."""
    asked, said = request["reduction"], answer.json()["usage"]["vision_tokens"]
    kept = VISION_TOKENS - int(VISION_TOKENS * asked["ratio"])
    wanted = {"encoded": VISION_TOKENS, "kept": kept, "withdrawn": kept if asked["withdraw"] else 0}
    return bool(wanted.items() <= said.items())


@dataclass
class Load:
    """Asks in the `KINDS` by turns, with pauses, until told to stop, at most `most` times; counts how it ended.

    Attributes:
        ended: requests by outcome: `right`, `wrong`, a status, or the name of what broke the connection.
    """

    url: str
    clients: int = 3
    most: int = 5000
    ended: Counter[str] = field(default_factory=Counter)
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Load:
        self._pool = ThreadPoolExecutor(self.clients)
        self._work = [self._pool.submit(self._ask_on, first) for first in range(self.clients)]
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()
        for work in self._work:
            work.result()

    def wait_for(self, more: int) -> None:
        """Until so many further requests have ended."""
        wanted = self.ended.total() + more
        while self.ended.total() < wanted and not all(work.done() for work in self._work):
            time.sleep(0.2)
        assert self.ended.total() >= wanted, self.ended

    def _ask_on(self, first: int) -> None:
        for number in range(first, self.most, self.clients):
            if self._stop.wait(PAUSE_S):
                return
            ratio, withdraw = KINDS[number % len(KINDS)]
            request = body(ratio, number % 7, withdraw=withdraw, question=f"Question {number}?")
            try:
                answer = ask(self.url, request)
            except httpx.TransportError as error:
                self.ended[type(error).__name__] += 1
                continue
            right = answer.status_code == 200 and is_right(request, answer)
            self.ended["right" if right else "wrong" if answer.status_code == 200 else str(answer.status_code)] += 1
