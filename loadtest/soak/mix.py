"""The requests of a soak: text and images, whole and streamed, reduced or not, good and bad, finished or broken off."""

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
"""Different ones: few enough that the caches for them are full once the server is warm."""
_BAD_SHARE = 0.05
_LONGEST_WAIT_S = 0.4


class HangUp(Enum):
    """Where a client goes away."""

    NEVER = "never"
    IN_BODY = "in the body"
    WAITING = "before the answer"
    FIRST_TOKEN = "after the first token"
    MIDWAY = "midway"


@dataclass(frozen=True, slots=True)
class Planned:
    """One request.

    Attributes:
        body: of the chat.
        expected: the status of its answer, if there is time for one.
        hang_up: where the client goes away.
        wait_s: how long it waits before, where it waits for nothing in particular.
        key: that it comes with, if any.
    """

    body: dict[str, Any]
    expected: int
    hang_up: HangUp
    wait_s: float
    key: str | None = None

    path = _PATH


def plan(count: int, abort_share: float, seed: int, key: str | None = None) -> Iterator[Planned]:
    """`count` requests, of which about `abort_share` are broken off, at all points alike."""
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
        yield Planned(body, 400 if bad else 200, hang_up, rng.uniform(0, _LONGEST_WAIT_S), key)


def chat(text: str, images: list[str], tokens: int) -> dict[str, Any]:
    """A chat of exactly `tokens` tokens; `images` are URLs."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    return {"messages": messages, "max_tokens": tokens, "ignore_eos": True}


def _image(seed: int) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return data_url(Image.fromarray(pixels).resize((120, 90)), "JPEG")
