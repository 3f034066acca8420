"""The requests of a soak test: text and images, whole and streamed, reduced or not, valid and invalid, or aborted."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from PIL import Image

from foldserve.loadtest.images import data_url

_PATH = "/v1/chat/completions"
_IMAGES = 24
"""Number of different images: so few that a warm server has them all in its caches."""
_BAD_SHARE = 0.05
_LONGEST_WAIT_S = 0.4


class HangUp(Enum):
    """Where a client hangs up."""

    NEVER = "never"
    IN_BODY = "in the body"
    WAITING = "before the answer"
    FIRST_TOKEN = "after the first token"
    MIDWAY = "midway"


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request.

    Attributes:
        expected: status of its answer, unless the client hangs up before.
        wait_s: time until the client hangs up, if it does not wait for an event.
        key: API key, or None.
    """

    body: dict[str, Any]
    expected: int
    hang_up: HangUp
    wait_s: float
    key: str | None = None

    path = _PATH


def plan(count: int, abort_share: float, seed: int, key: str | None = None) -> Iterator[PlannedRequest]:
    """`count` requests, of which about `abort_share` are aborted, evenly at all points."""
    rng = random.Random(seed)
    images = [_image(i) for i in range(_IMAGES)]
    points = [point for point in HangUp if point is not HangUp.NEVER]
    for number in range(count):
        hang_up = rng.choice(points) if rng.random() < abort_share else HangUp.NEVER
        bad = hang_up is HangUp.NEVER and rng.random() < _BAD_SHARE
        body = chat(f"soak {number}", rng.choices(images, k=rng.choice((0, 0, 1, 1, 2))), rng.randint(1, 24))
        body["stream"] = hang_up in (HangUp.FIRST_TOKEN, HangUp.MIDWAY) or rng.random() < 0.5
        body |= rng.choice(({}, {}, {"reduction_ratio": rng.choice((0.25, 0.5, 0.75, 0.9))}))
        body |= {"reduction_ratio": 1.5} if bad else {}
        yield PlannedRequest(body, 400 if bad else 200, hang_up, rng.uniform(0, _LONGEST_WAIT_S), key)


def chat(text: str, images: list[str], tokens: int) -> dict[str, Any]:
    """A chat of exactly `tokens` tokens; `images` are URLs."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    return {"messages": messages, "max_tokens": tokens, "ignore_eos": True}


def _image(seed: int) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return data_url(Image.fromarray(pixels).resize((120, 90)), "JPEG")
