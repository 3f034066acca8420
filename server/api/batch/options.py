"""Options of one batch run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Existing = Literal["refuse", "resume", "overwrite"]  # for results that exist already


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """Options of one run; raises ValueError for a file or a number that can't be used.

    `concurrency` is the number of requests in flight; None for as many as keep the engine busy.
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
