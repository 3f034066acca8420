"""What a user may ask of an analysis."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from foldserve.server.options import option, positional

_NEEDED = {"matplotlib": "matplotlib", "ot": "pot"}


@dataclass(frozen=True, slots=True)
class AnalysisOptions:
    """Raises ValueError if what is asked can't be done."""

    model: str = positional("MODEL")
    data: Path | None = option(None, "DIR|JSONL", "as evaluate takes it (default: built-in scenes)")
    samples: int = option(20, "N", "images to take from the data")
    question: str = option("Describe this image in detail.", "TEXT", "asked of images that bring none")
    ratio: float = option(0.5, "R", "share of tokens merged")
    output: Path = option(Path("analysis"), "DIR")

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(f"--ratio is the share of tokens to merge, in (0, 1), not {self.ratio}")
        missing = [package for module, package in _NEEDED.items() if find_spec(module) is None]
        if missing:
            raise ValueError(f'the analysis needs {" and ".join(missing)}: pip install "foldserve[quality]"')
