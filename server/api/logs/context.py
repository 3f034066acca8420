"""The id of the current request, for responses and log lines."""

from __future__ import annotations

import logging
import re
import uuid
from contextvars import ContextVar

request_id: ContextVar[str | None] = ContextVar("foldserve_request_id", default=None)
"""Follows a request through the tasks and threads that work on it."""

_ACCEPTED = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def choose_request_id(sent: str | None) -> str:
    """The client's own id if it is harmless in logs and in vLLM's request names, else a new one."""
    return sent if sent is not None and _ACCEPTED.fullmatch(sent) else uuid.uuid4().hex


class RequestIdFilter(logging.Filter):
    """Adds `request_id` to every record, and `request_tag`, its form for text lines."""

    def filter(self, record: logging.LogRecord) -> bool:
        current = request_id.get()
        record.request_id = current
        record.request_tag = f"[{current}] " if current else ""
        return True
