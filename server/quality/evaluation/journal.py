"""Outcomes measured so far, on disk, so that a stopped evaluation can go on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from foldserve.loadtest.report.journal import Journal, JournalLine


class Outcome(BaseModel):
    """One question under one variant.

    Attributes:
        right: None if no answer is known.
        kl: KL(P_variant || P_ratio0) of the answer's first token, in nats.
        agrees: whether the likeliest first token is that of ratio 0.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    answer: str
    right: bool | None
    kl: float
    agrees: bool


class _Line(JournalLine[list[Outcome]]):
    key: str = Field(alias="variant")
    result: list[Outcome] = Field(alias="outcomes")


class OutcomeJournal(Journal[list[Outcome]]):
    """Outcomes of one run by `Variant.key`, in the order of the questions, and the reference distributions."""

    line = _Line

    def __init__(self, folder: Path, run: str) -> None:
        super().__init__(folder, run)
        self._reference = folder / f"reference-{run}.npy"

    def load_reference(self) -> NDArray[np.float32] | None:
        """(questions, vocab) log-probabilities of the first token at ratio 0, or None if not saved."""
        return np.load(self._reference) if self._reference.is_file() else None

    def save_reference(self, first: NDArray[np.float32]) -> None:
        """Atomic."""
        partial = self._reference.with_suffix(".part.npy")
        np.save(partial, first)
        partial.replace(self._reference)
