"""The id of the request that is being worked on, for responses and log lines."""

from __future__ import annotations

import logging
import re
import uuid
from contextvars import ContextVar

request_id: ContextVar[str | None] = ContextVar("foldserve_request_id", default=None)
"""Follows a request through the tasks and threads that work on it."""

_ACCEPTED = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def choose_request_id(sent: str | None) -> str:
    """The client's own id where it is harmless in a log and in vLLM's names of requests, or else a new one."""
    return sent if sent is not None and _ACCEPTED.fullmatch(sent) else uuid.uuid4().hex


class RequestIdFilter(logging.Filter):
    """Adds `request_id` to every record, and `request_tag`, its form for lines of text."""

    def filter(self, record: logging.LogRecord) -> bool:
        current = request_id.get()
        record.request_id = current
        record.request_tag = f"[{current}] " if current else ""
        return True
