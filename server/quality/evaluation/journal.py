"""What has been measured so far, on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from foldserve.loadtest.report.journal import Journal, Line


class Outcome(BaseModel):
    """One question under one variant.

    Attributes:
        answer: the model's.
        right: None where no answer is known.
        kl: KL(P_variant || P_ratio0) of the answer's first token, in nats.
        agrees: the likeliest first token is that of ratio 0.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    answer: str
    right: bool | None
    kl: float
    agrees: bool


class _Line(Line[list[Outcome]]):
    key: str = Field(alias="variant")
    result: list[Outcome] = Field(alias="outcomes")


class OutcomeJournal(Journal[list[Outcome]]):
    """The outcomes of one run in the order of the questions, by `Variant.key`, and the reference beside them."""

    line = _Line

    def __init__(self, folder: Path, run: str) -> None:
        super().__init__(folder, run)
        self._reference = folder / f"reference-{run}.npy"

    def load_reference(self) -> NDArray[np.float32] | None:
        """(questions, vocab) log-probabilities of the first token at ratio 0, if they are there."""
        return np.load(self._reference) if self._reference.is_file() else None

    def save_reference(self, first: NDArray[np.float32]) -> None:
        """Keeps them for the next run; half a file never lies under the name."""
        partial = self._reference.with_suffix(".part.npy")
        np.save(partial, first)
        partial.replace(self._reference)
