"""What a user may ask of a calibration."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from foldserve.server.options import flag, option, positional

_OF_LAYERS = ("eta", "min_layer", "plot")
_OF_AUTO = ("target", "method", "group_field", "pixel_cap", "batch", "results")


def parse_pixel_cap(text: str) -> int | None:
    """Reads `LEVELS` or `none`; ValueError where it is neither."""
    if text == "none":
        return None
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"a number of levels or none is needed, not {text!r}") from error


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
    samples: int | None = option(
        None, "N", "pairs to take from the data (default: 20; with --auto all, or 600 of the built-in scenes)"
    )
    answer_tokens: int = option(
        32,
        "N",
        "a sample's KL is the mean over so many tokens of the model's own answer; 1: its first, as in the paper",
    )
    min_layer: int = option(5, "K", "first K to look at")
    question: str = option("Describe this image in detail.", "TEXT", "asked of images that bring none")
    output: Path | None = option(
        None, "FILE", "(default: withdrawal.json, or auto.json, in a local MODEL, else in the cache)"
    )
    plot: Path | None = option(None, "FILE", "(default: the output's name with .png)")

    auto: bool = option(
        False,
        None,
        'find how few vision tokens each group of requests needs, for requests with "ratio": "auto"',
        group="with --auto",
    )
    target: float = option(0.05, None, "share of the answers that may change")
    method: str = option("folder", "METHOD", "as in a request, before the decoder; options as name:option=value")
    group_field: str | None = option(
        None, "NAME", "field of a JSONL line that names a request's group; kind for the built-in scenes (default: one)"
    )
    pixel_cap: int | None = option(
        None,
        "LEVELS|none",
        "keep no more tokens of an image than it has cells of pixels that differ from their neighbours by more levels, "
        "0 to 255; none: pixels have no say (default: none)",
        parse=parse_pixel_cap,
    )
    batch: int = option(64, "N", "prompts handed over at once")
    results: Path = option(Path("auto"), "DIR", "what was measured, and the page; a stopped run goes on from there")

    def __post_init__(self) -> None:
        self._refuse_others()
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"at least one sample is needed, not {self.samples}")
        if not 0 < self.target < 1:
            raise ValueError(f"--target is a share of the answers, between 0 and 1, not {self.target}")
        if self.pixel_cap is not None and not 0 <= self.pixel_cap <= 255:
            raise ValueError(f"--pixel-cap is a number of levels, 0 to 255, or none, not {self.pixel_cap}")
        if self.batch < 1:
            raise ValueError(f"--batch must be at least 1, not {self.batch}")
        if not self.eta > 0:
            raise ValueError(f"--eta is a KL divergence in nats and must be greater than 0, not {self.eta}")
        if self.answer_tokens < 1:
            raise ValueError(f"--answer-tokens must be at least 1, not {self.answer_tokens}")

    def _refuse_others(self) -> None:
        """Raises ValueError if an option of the other search was given."""
        others, mode = (_OF_LAYERS, "with --auto") if self.auto else (_OF_AUTO, "without --auto")
        for known in fields(self):
            if known.name in others and getattr(self, known.name) != known.default:
                raise ValueError(f"{flag(known.name)} means nothing {mode}: leave it out")
