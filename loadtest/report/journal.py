"""Results on disk, so that a stopped run can go on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

RESULTS_FILE = "results.jsonl"
_T = TypeVar("_T")


class JournalLine(BaseModel, Generic[_T]):
    """One result. A subclass names `key` and `result` in the file, by aliases."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_by_name=True, serialize_by_alias=True)

    run: str
    key: str
    result: _T


class Journal(Generic[_T]):
    """Results of one run, one line each, in a file that may hold those of other runs.

    A line that was cut off while it was written is dropped.

    Args:
        folder: holds `RESULTS_FILE`.
        run: see `run_identity`.

    Raises:
        ValueError: the file holds a line that is no result.
    """

    line: ClassVar[type[JournalLine[Any]]]

    def __init__(self, folder: Path, run: str) -> None:
        self._file, self._run = folder / RESULTS_FILE, run
        self._known: dict[str, _T] = {}
        folder.mkdir(parents=True, exist_ok=True)
        text = self._file.read_text() if self._file.is_file() else ""
        complete = text[: text.rfind("\n") + 1]
        if complete != text:
            self._file.write_text(complete)
        for number, row in enumerate(complete.splitlines(), start=1):
            try:
                line = self.line.model_validate_json(row)
            except ValueError as error:
                raise ValueError(f"{self._file}, line {number}, is no result: move the file away ({error})") from error
            if line.run == run:
                self._known[line.key] = line.result

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> _T:
        return self._known[key]

    def add(self, key: str, result: _T) -> None:
        line = self.line(run=self._run, key=key, result=result)
        with self._file.open("a") as file:
            file.write(line.model_dump_json() + "\n")
        self._known[key] = result


def run_identity(**parts: object) -> str:
    """Hash of what a run's results depend on: runs of equal hash share results."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
