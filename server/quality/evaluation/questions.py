"""The questions of an evaluation, with their answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from foldserve.server.quality.calibration_data import Sample, load_samples
from foldserve.server.quality.demo.examples import chat_messages
from foldserve.server.quality.demo.examples import questions as demo_questions

HELD_OUT_SEED = 1
"""Seed of the built-in scenes. No seed's scenes occur in the demo model's training."""

ALL = "all"
"""Kind of a question without one."""


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """One question about one image.

    Attributes:
        answers: all right answers; empty if none is known.
        kind: accuracy is reported by kind.
        history: earlier turns (question, answer) about the image.
    """

    image: Path | Image.Image
    text: str
    answers: tuple[str, ...] = ()
    kind: str = ALL
    history: tuple[tuple[str, str], ...] = ()

    def open(self) -> Image.Image:
        """The image in RGB; ValueError if it can't be read."""
        return Sample(self.image, self.text).open()

    def messages(self) -> list[dict[str, Any]]:
        """OpenAI chat messages, with the image before the first question."""
        return chat_messages({"type": "image_pil", "image_pil": self.open()}, self.history, self.text)


class _JsonlQuestion(BaseModel):
    """A line of a JSONL file. Other fields are ignored, except the one that holds the kind."""

    model_config = ConfigDict(strict=True, extra="allow")

    image: str
    question: str
    answer: str | list[str] = Field(default_factory=list)


def load_questions(
    data: Path | None, limit: int, question: str, *, kind_field: str = "kind", seed: int = HELD_OUT_SEED
) -> list[Question]:
    """At most `limit` questions, spread evenly over a file or folder.

    Args:
        data: None for the built-in scenes; a JSONL file of lines `{"image": path, "question": text, "answer": text or
            list of texts, "kind": text}`, the last two optional, paths relative to the file; or a folder of images, as
            for `foldserve calibrate`, without answers.
        question: for images of a folder that have no question of their own.
        kind_field: name of the field that holds the kind in a JSONL file.
        seed: of the built-in scenes.

    Raises:
        ValueError: no such data, none in it, or a malformed line.
    """
    if limit < 1:
        raise ValueError(f"at least one question is needed, not {limit}")
    if data is None:
        found = demo_questions(seed, limit)
        return [Question(q.image, q.question, (q.answer,), q.kind, q.history) for q in found]
    if data.is_file():
        return _spread_over_kinds(_from_jsonl(data, kind_field), limit, data)
    return [Question(sample.image, sample.question) for sample in load_samples(data, limit, question)]


def _from_jsonl(file: Path, kind_field: str) -> list[Question]:
    found = []
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = _JsonlQuestion.model_validate_json(line)
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'line'}: {e['msg']}" for e in error.errors())
            raise ValueError(
                f'{file}, line {number}: {{"image": path, "question": text, "answer": text}} is needed ({wrong})'
            ) from error
        answers = (row.answer,) if isinstance(row.answer, str) else tuple(row.answer)
        kind = (row.model_extra or {}).get(kind_field, ALL)
        if not isinstance(kind, str):
            raise ValueError(f"{file}, line {number}: {kind_field} has to be a text, not {kind!r}")
        found.append(Question(file.parent / row.image, row.question, answers, kind))
    return found


def _spread_over_kinds(found: Sequence[Question], limit: int, data: Path) -> list[Question]:
    if not found:
        raise ValueError(f"{data} holds no questions")
    count = min(limit, len(found))
    return [found[i * len(found) // count] for i in range(count)]


def data_hash(questions: Sequence[Question]) -> str:
    """SHA-256 of texts, answers, kinds and every pixel."""
    digest = hashlib.sha256()
    for question in questions:
        image = question.open()
        text = json.dumps([image.size, question.text, question.answers, question.kind, question.history])
        digest.update(text.encode() + image.tobytes())
    return f"sha256:{digest.hexdigest()}"
