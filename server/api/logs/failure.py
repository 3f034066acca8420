"""Why a server does not start: the last line that its operator sees, whichever process failed."""

from __future__ import annotations

import logging

from pydantic import ValidationError

from foldserve.server import guardian

_LONGEST = 1000
_LAST_WORDS = ("EngineCore failed to start.", "WorkerProc failed to start.")


def report_failure(error: BaseException) -> bool:
    """Tells the guardian; True if no process has told it before. The first process to fail knows the reason."""
    return guardian.report_failure(reason(error))


def reason(error: BaseException) -> str:
    """An error's text in one line, with its type if the text alone says too little."""
    if isinstance(error, ValidationError):
        text = "; ".join(detail["msg"].removeprefix("Value error, ") for detail in error.errors())
    elif isinstance(error, ValueError | OSError | RuntimeError) and str(error):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error}"
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."


class FailureHandler(logging.Handler):
    """Reports the error in an engine or worker process's last log line: its parent only knows that it ended."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None and record.getMessage() in _LAST_WORDS:
            report_failure(record.exc_info[1])
