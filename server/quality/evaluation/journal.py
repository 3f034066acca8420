"""What has been measured so far, on disk: a run that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

RESULTS_FILE = "results.jsonl"


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


class _Line(BaseModel):
    """One variant's outcomes in the order of the questions; `run` says of which model, data and engine."""

    run: str
    variant: str
    outcomes: list[Outcome]


def run_identity(**parts: object) -> str:
    """Equal for runs whose results may stand in for each other."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


class Journal:
    """Results of one run in a folder that may hold those of others: a line per variant, written when it is done."""

    def __init__(self, folder: Path, run: str) -> None:
        """Reads what is there; a line that was cut off while it was written is dropped.

        Raises:
            ValueError: a file that no evaluation wrote.
        """
        self._run, self._file = run, folder / RESULTS_FILE
        self._reference = folder / f"reference-{run}.npy"
        self._known: dict[str, list[Outcome]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        text = self._file.read_text() if self._file.is_file() else ""
        complete = text[: text.rfind("\n") + 1]
        if complete != text:
            self._file.write_text(complete)
        for number, row in enumerate(complete.splitlines(), start=1):
            try:
                line = _Line.model_validate_json(row)
            except ValueError as error:
                raise ValueError(f"{self._file}, line {number}, is no result: move the file away ({error})") from error
            if line.run == run:
                self._known[line.variant] = line.outcomes

    def __contains__(self, variant: str) -> bool:
        return variant in self._known

    def __getitem__(self, variant: str) -> list[Outcome]:
        return self._known[variant]

    def add(self, variant: str, outcomes: Sequence[Outcome]) -> None:
        """Appends a variant's outcomes."""
        line = _Line(run=self._run, variant=variant, outcomes=list(outcomes))
        with self._file.open("a") as file:
            file.write(line.model_dump_json() + "\n")
        self._known[variant] = line.outcomes

    def load_reference(self) -> NDArray[np.float32] | None:
        """(questions, vocab) log-probabilities of the first token at ratio 0, if they are there."""
        return np.load(self._reference) if self._reference.is_file() else None

    def save_reference(self, first: NDArray[np.float32]) -> None:
        """Keeps them for the next run; half a file never lies under the name."""
        partial = self._reference.with_suffix(".part.npy")
        np.save(partial, first)
        partial.replace(self._reference)
