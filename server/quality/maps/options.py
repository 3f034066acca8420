"""What a user may ask of a map."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from foldserve.reducers.reduction import Reduction
from foldserve.server.options import option, positional
from foldserve.server.settings import parse_reduction


@dataclass(frozen=True, slots=True)
class MapOptions:
    """Raises ValueError if what is asked can't be done."""

    image: Path = positional("IMAGE", "a file that Pillow reads")
    model: str | None = positional("MODEL", "(default: the demo model)", default=None)
    method: str | None = option(None, "NAME", 'as in a request\'s `reduction` (default: "folder")')
    ratio: float | None = option(None, "R", "share of tokens removed (default: 0.66 without --keep-tokens)")
    keep_tokens: int | None = option(None, "N", "tokens kept, instead of --ratio")
    reduction: Reduction | None = option(
        None, "JSON", "a request's `reduction` object, instead of the three above", parse=parse_reduction
    )
    question: str = option("What is in the picture?", "TEXT", "that stands beside the image in the prompt")
    output: Path = option(Path("map.png"), "FILE", "the picture", short="-o")

    def __post_init__(self) -> None:
        if not self.image.is_file():
            raise ValueError(f"{self.image} is no file")
        if self.reduction is not None and (self.method or self.ratio is not None or self.keep_tokens is not None):
            raise ValueError("--reduction says all: leave --method, --ratio and --keep-tokens out")
        if self.output.exists() and not self.output.is_file():
            raise ValueError(f"--output {self.output} is no file")
        self.requested_reduction  # noqa: B018  # checks it

    @property
    def requested_reduction(self) -> Reduction:
        if self.reduction is not None:
            return self.reduction
        fields: dict[str, object] = {"method": self.method} if self.method else {}
        if self.ratio is not None:
            fields["ratio"] = self.ratio
        if self.keep_tokens is not None:
            fields["keep_tokens"] = self.keep_tokens
        if not fields.keys() - {"method"} and self.method not in ("base_only", "withdraw"):
            fields["ratio"] = 0.66
        return Reduction.parse(fields)
