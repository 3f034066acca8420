"""Workloads: lists of chats, as OpenAI messages."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the command line needs the names of workloads, not Pillow
    from foldserve.loadtest.images import Images

Messages = list[dict[str, Any]]

_WORDS = (
    "the",
    "picture",
    "shows",
    "what",
    "is",
    "left",
    "of",
    "how",
    "many",
    "small",
    "red",
    "boxes",
    "stand",
    "near",
)
_TURNS = 4
_IMAGES = 3


@dataclass(frozen=True, slots=True)
class SourceFactory:
    """Makes different requests for every block; `words` is the length of a question."""

    images: Images
    words: int

    def source(self, block: str) -> MessageSource:
        """The source for a block, independent of other blocks."""
        return MessageSource(self, block)


class MessageSource:
    """Parts of messages for one block; the block's name decides the number of its first image."""

    def __init__(self, factory: SourceFactory, block: str) -> None:
        self._factory = factory
        self._random = random.Random(block)
        self._numbers = count(self._random.getrandbits(64))

    def image(self) -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": self._factory.images.url(next(self._numbers))}}

    def text(self, words: int | None = None) -> dict[str, Any]:
        """Random words, so that no question is a prefix of another."""
        length = self._factory.words if words is None else words
        return {"type": "text", "text": " ".join(self._random.choices(_WORDS, k=length))}

    def video(self) -> dict[str, Any]:
        return {"type": "video_url", "video_url": {"url": self._factory.images.video_url(next(self._numbers))}}

    def user(self, images: int, words: int | None = None) -> dict[str, Any]:
        """A user's message with the images before the text."""
        return {"role": "user", "content": [*(self.image() for _ in range(images)), self.text(words)]}


@dataclass(frozen=True, slots=True)
class Workload:
    """A kind of use.

    Attributes:
        make: makes `n` chats from a source.
        output_tokens: default length of an answer.
        burstiness: shape of the gamma distribution of times between requests; 1 is a Poisson process.
    """

    describe: str
    make: Callable[[MessageSource, int], list[Messages]]
    output_tokens: int = 16
    burstiness: float = 1.0


def _chat(source: MessageSource, n: int) -> list[Messages]:
    return [[source.user(1)] for _ in range(n)]


def _several(source: MessageSource, n: int) -> list[Messages]:
    return [[source.user(_IMAGES)] for _ in range(n)]


def _mix(source: MessageSource, n: int) -> list[Messages]:
    return [[source.user(number % 2)] for number in range(n)]


def _video(source: MessageSource, n: int) -> list[Messages]:
    return [[{"role": "user", "content": [source.video(), source.text()]}] for _ in range(n)]


def _turns(source: MessageSource, n: int) -> list[Messages]:
    """All dialogues' first turns, then all second ones, ...: so each turn comes long after the one before."""
    dialogues = [[source.user(1)] for _ in range(-(-n // _TURNS))]
    chats = [list(dialogue) for dialogue in dialogues]
    for _ in range(_TURNS - 1):
        for dialogue in dialogues:
            dialogue += [{"role": "assistant", "content": source.text()["text"]}, source.user(0)]
        chats += [list(dialogue) for dialogue in dialogues]
    return chats[:n]


WORKLOADS = {
    "chat": Workload("one image and a question", _chat),
    "turns": Workload(f"dialogues of {_TURNS} questions on one image", _turns),
    "images": Workload(f"{_IMAGES} images and a question", _several),
    "video": Workload("one video and a question", _video),
    "mix": Workload("every second request without an image", _mix),
    "long": Workload("one image and a long answer", _chat, output_tokens=256),
    "bursts": Workload("one image and a question, arriving in bursts", _chat, burstiness=0.1),
}
