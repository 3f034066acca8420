"""Held-out questions with images and answers, to measure a model with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from foldserve.server.quality.demo.questions import ALL_KINDS, Dialogue, ask
from foldserve.server.quality.demo.scene import Scene, draw_scene

_HELD_OUT = 2  # training draws from the streams (seed, 0, step) and (seed, 1, step)


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
        texts = [text for turn in self.history for text in turn] + [self.question]
        messages: list[dict[str, object]] = [
            {"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)
        ]
        messages[0]["content"] = [image or {"type": "image"}, {"type": "text", "text": texts[0]}]
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
