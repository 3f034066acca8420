"""What a user may ask of a calibration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from foldserve.server.options import option, positional


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """Raises ValueError if what is asked can't be done."""

    model: str = positional("MODEL")
    data: Path | None = option(
        None,
        "DIR|JSONL",
        'images, each with its question in a .txt file or none, or lines {"image": path, "question": text} '
        "(default: built-in scenes, which the demo model knows)",
    )
    eta: float = option(0.003, None, "largest mean KL accepted, in nats")
    samples: int = option(20, "N", "pairs to take from the data")
    answer_tokens: int = option(
        32,
        "N",
        "a sample's KL is the mean over so many tokens of the model's own answer; 1: its first, as in the paper",
    )
    min_layer: int = option(5, "K", "first K to look at")
    question: str = option("Describe this image in detail.", "TEXT", "asked of images that bring none")
    output: Path | None = option(None, "FILE", "(default: withdrawal.json in a local MODEL, else in the cache)")
    plot: Path | None = option(None, "FILE", "(default: the output's name with .png)")

    def __post_init__(self) -> None:
        if not self.eta > 0:
            raise ValueError(f"--eta is a KL divergence in nats and must be greater than 0, not {self.eta}")
        if self.answer_tokens < 1:
            raise ValueError(f"--answer-tokens must be at least 1, not {self.answer_tokens}")
