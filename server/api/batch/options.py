"""What a user asks of one run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Existing = Literal["refuse", "resume", "overwrite"]
"""What to do with results that are there already."""


@dataclass(frozen=True, slots=True)
class Options:
    """Of one run.

    Attributes:
        input: requests, one a line.
        output: where the results go.
        existing: what becomes of results that are there.
        concurrency: requests in flight; None for what keeps the engine busy.

    Raises:
        ValueError: files that can't be meant.
    """

    input: Path
    output: Path
    existing: Existing = "refuse"
    concurrency: int | None = None

    def __post_init__(self) -> None:
        if not self.input.is_file():
            raise ValueError(f"--input must be a file, which is read twice, not {self.input}")
        if self.output.exists() and self.output.samefile(self.input):
            raise ValueError(f"--output is the input: {self.output}")
        if self.concurrency is not None and self.concurrency < 1:
            raise ValueError(f"--concurrency must be at least 1, not {self.concurrency}")
