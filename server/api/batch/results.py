"""The output file: one whole line per answered line of the input, whenever the run is killed."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jiter

from foldserve.server.api.batch.options import Existing
from foldserve.server.api.batch.survey import Survey

_PREFIX = "batch_req_"


@dataclass(frozen=True, slots=True)
class LineResult:
    """A line of the output, and its part of the totals."""

    line: bytes
    is_answer: bool = False
    encoded: int = 0
    kept: int = 0


@dataclass(slots=True)
class Totals:
    lines: int = 0
    refused: int = 0
    encoded: int = 0
    kept: int = 0

    def add(self, result: LineResult) -> None:
        self.lines += 1
        self.refused += not result.is_answer
        self.encoded += result.encoded
        self.kept += result.kept


class OutputFile:
    """The output of a run; no other run can write it at the same time.

    A line is appended by one write once its answer is complete. A killed process leaves whole lines and at most one
    that is cut off; the next start removes that one and answers its request again. `sync` only limits how many answers
    a power failure costs: they are computed again, and none is lost or doubled.

    Raises ValueError if another run writes there, or the results are neither resumed nor overwritten, or of another
    input, and OSError if the file can't be written.
    """

    def __init__(self, path: Path, survey: Survey, existing: Existing) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self.totals = Totals()
        self._done = bytearray(survey.last + 1)  # by number
        try:
            self._lock()
            self._begin(survey, existing)
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.sync()
        os.close(self._file)

    def __contains__(self, number: int) -> bool:
        return bool(self._done[number])

    def add(self, result: LineResult) -> None:
        rest = memoryview(result.line)
        while rest:
            rest = rest[os.write(self._file, rest) :]
        self.totals.add(result)

    def sync(self) -> None:
        """Returns once all added results are on the disk."""
        os.fsync(self._file)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{self._path}: another run writes there: wait for its end, or name another file"
            ) from error

    def _begin(self, survey: Survey, existing: Existing) -> None:
        if existing == "overwrite":
            os.ftruncate(self._file, 0)
        elif existing == "refuse" and os.fstat(self._file).st_size:
            raise ValueError(f"{self._path} has results: --resume answers the missing lines, --overwrite begins anew")
        self._read(survey)

    def _read(self, survey: Survey) -> None:
        """Notes what is answered, and removes a line that was cut off."""
        whole = 0
        with open(os.dup(self._file), "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                self._read_line(line, number, survey)
                whole += len(line)
        os.ftruncate(self._file, whole)

    def _read_line(self, line: bytes, at: int, survey: Survey) -> None:
        try:
            result = jiter.from_json(line, cache_mode="none")
            number = int(result["id"].removeprefix(_PREFIX))
            is_ours = survey.has(number, result["custom_id"])
            counts = _counts(result)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self._path}, line {at}, is no result of a batch: name another file") from error
        if not is_ours or number in self:
            raise ValueError(
                f"{self._path}, line {at}, answers {result['custom_id']!r:.100}, which "
                + ("has been answered before" if is_ours else f"is not what line {number} of the input asks")
                + ": resume with the input that the results belong to, or --overwrite them"
            )
        self._done[number] = 1
        self.totals.add(LineResult(line, *counts))


def answer(number: int, custom_id: str | None, status: int, request_id: str, body: bytes) -> bytes:
    """The line of a request that the application answered or refused; `body` is compact JSON."""
    head = _head(number, custom_id) | {"response": {"status_code": status, "request_id": request_id}}
    return json.dumps(head).encode()[:-2] + b', "body": ' + body + b'}, "error": null}\n'


def failure(number: int, custom_id: str | None, error: dict[str, str | None]) -> bytes:
    """The line of something that is not a request."""
    return json.dumps(_head(number, custom_id) | {"response": None, "error": error}).encode() + b"\n"


def _head(number: int, custom_id: str | None) -> dict[str, Any]:
    return {"id": f"{_PREFIX}{number}", "custom_id": custom_id}


def _counts(result: dict[str, Any]) -> tuple[bool, int, int]:
    """Whether a result is an answer, and its vision tokens: (is_answer, encoded, kept)."""
    response = result["response"]
    if response is None or response["status_code"] != 200:
        return False, 0, 0
    vision = (response["body"].get("usage") or {}).get("vision_tokens") or {}
    return True, vision.get("encoded", 0), vision.get("kept", 0)
