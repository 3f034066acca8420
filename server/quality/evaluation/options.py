"""What a user may ask of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from foldserve.server.options import flag, option, positional

_NEEDED = ("matplotlib", "scipy")


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """Raises ValueError if what is asked can't be done."""

    model: str = positional("MODEL")
    methods: tuple[str, ...] = option(
        (),
        "METHOD",
        "names, name:option=value, a+b with b in the decoder, or JSON as in a request (default: all there are)",
        nargs="+",
    )
    ratios: tuple[float, ...] = option(
        (0, 0.25, 0.5, 0.66, 0.75, 0.9),
        "R,R,...",
        "shares of vision tokens removed",
        expected="ratios such as 0,0.5,0.75",
    )
    withdraw: tuple[int, ...] = option(
        (),
        "K,K,...",
        "withdrawal layers; the engine is started once for each (default: none)",
        expected="decoder layers such as 4,8",
    )
    data: Path | None = option(
        None,
        "DIR|JSONL",
        'lines {"image": path, "question": text, "answer": text or list, "kind": text}, or a folder of images, '
        "as calibrate takes it (default: built-in scenes, which the demo model knows)",
    )
    limit: int = option(600, "N", "questions to take from the data")
    question: str = option("Describe this image in detail.", "TEXT", "asked of images that bring none")
    max_tokens: int = option(96, "N", "longest answer")
    batch: int = option(64, "N", "questions handed over at once")
    output: Path = option(Path("quality"), "DIR")
    card: Path | None = option(None, "FILE", "(default: quality.json in a local MODEL, which /v1/reducers shows)")

    def __post_init__(self) -> None:
        for ratio in self.ratios:
            if not 0 <= ratio < 1:
                raise ValueError(f"--ratios are shares of vision tokens to remove, each in [0, 1), not {ratio}")
        for name in ("max_tokens", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} must be at least 1, not {getattr(self, name)}")
        missing = [name for name in _NEEDED if find_spec(name) is None]
        if missing:
            raise ValueError(f'evaluation needs {" and ".join(missing)}: pip install "foldserve[quality]"')
