"""The images and questions of a calibration."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from foldserve.server.quality.demo.examples import questions
from foldserve.server.quality.demo.questions import KINDS

_IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

_SEED = 3  # of the built-in scenes: not the scenes of an evaluation


@dataclass(frozen=True, slots=True)
class Sample:
    """One question about one image, which is a file or the image itself."""

    image: Path | Image.Image
    question: str

    def open(self) -> Image.Image:
        """The image in RGB; ValueError if it is unreadable."""
        if isinstance(self.image, Image.Image):
            return self.image.convert("RGB")
        try:
            with Image.open(self.image) as image:
                return image.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"{self.image} can't be read as an image: {error}") from error


def load_samples(data: Path | None, count: int, question: str) -> list[Sample]:
    """At most `count` samples, spread evenly over `data`; the same ones each time.

    Args:
        data: a folder of images, each with its question in a `.txt` file of the same stem, else `question`; a JSONL
            file of lines `{"image": path, "question": text}`, paths relative to the file's folder; or None for the
            built-in scenes, which the demo model knows.

    Raises:
        ValueError: no such data, none in it, or a malformed line.
    """
    if count < 1:
        raise ValueError(f"at least one sample is needed, not {count}")
    if data is None:
        return [Sample(example.image, example.question) for example in questions(_SEED, count, tuple(KINDS))]
    if data.is_dir():
        samples = _from_folder(data, question)
    elif data.is_file():
        samples = _from_jsonl(data)
    else:
        raise ValueError(f"{data} is neither a folder of images nor a JSONL file")
    if not samples:
        raise ValueError(f"{data} holds no images: {', '.join(sorted(_IMAGE_SUFFIXES))} are looked for")
    count = min(count, len(samples))
    return [samples[i * len(samples) // count] for i in range(count)]


def _from_folder(folder: Path, question: str) -> list[Sample]:
    images = sorted(path for path in folder.iterdir() if path.suffix.lower() in _IMAGE_SUFFIXES)
    asked = [image.with_suffix(".txt") for image in images]
    texts = [file.read_text().strip() if file.is_file() else question for file in asked]
    return [Sample(image, text) for image, text in zip(images, texts, strict=True)]


def _from_jsonl(file: Path) -> list[Sample]:
    samples = []
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            samples.append(Sample(file.parent / row["image"], str(row["question"])))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{file}, line {number}: {{"image": path, "question": text}} is needed') from error
    return samples
