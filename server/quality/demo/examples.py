"""Held-out questions with images and answers, to measure a model with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from foldserve.server.quality.demo.questions import ALL_KINDS, Dialogue, ask
from foldserve.server.quality.demo.scene import Scene, draw_scene

_HELD_OUT = 2  # a random stream of its own: training draws from (seed, n, step), n = 0, 1, 3, 4


@dataclass(frozen=True, eq=False)
class Example:
    """A question about an image and its one right answer; `history` holds earlier (question, answer) turns."""

    image: Image.Image
    question: str
    answer: str
    kind: str
    history: tuple[tuple[str, str], ...] = ()

    def messages(self, image: dict[str, object] | None = None) -> list[dict[str, object]]:
        """OpenAI chat messages; the first holds the image part, by default `{"type": "image"}`."""
        return chat_messages(image or {"type": "image"}, self.history, self.question)


def chat_messages(image: dict[str, Any], history: Sequence[tuple[str, str]], question: str) -> list[dict[str, Any]]:
    """OpenAI chat messages of a dialogue, with the image part before the first question."""
    texts = [text for turn in history for text in turn] + [question]
    messages: list[dict[str, Any]] = [
        {"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)
    ]
    messages[0]["content"] = [image, {"type": "text", "text": texts[0]}]
    return messages


def questions(seed: int, count: int, kinds: tuple[str, ...] = ALL_KINDS) -> list[Example]:
    """`count` questions, each about a new scene that is not in the training data; the kinds take turns.

    Equal arguments give equal questions; a smaller `count` gives a prefix.
    """
    rng = np.random.default_rng((seed, _HELD_OUT))
    return [_question(rng, kinds[index % len(kinds)]) for index in range(count)]


def _question(rng: np.random.Generator, kind: str) -> Example:
    while True:
        scene = draw_scene(rng)
        dialogue = ask(rng, scene, kind)
        if dialogue is not None and (kind != "ocr" or scene.number is not None):  # "no number" is no reading
            return _example(scene, dialogue)


def _example(scene: Scene, dialogue: Dialogue) -> Example:
    *earlier, last = dialogue.turns
    history = tuple((turn.question, turn.answer) for turn in earlier)
    return Example(scene.image, last.question, last.answer, dialogue.kind, history)
