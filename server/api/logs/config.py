"""The one logging configuration of all our processes, in text or JSON. vLLM and uvicorn apply it themselves."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from foldserve.server import guardian

VARIABLE = "VLLM_LOGGING_CONFIG_PATH"
"""Names a file for `logging.config.dictConfig`, which every vLLM process reads first."""

_TEXT = (
    "(%(vllm_process_name)s pid=%(process)d) %(levelname)s %(asctime)s [%(fileinfo)s:%(lineno)d] "
    "%(request_tag)s%(message)s"
)
_ONLY_FOR_TEXT = ("color_message", "fileinfo", "request_tag")
_HERE = "foldserve.server.api.logs"
STARTUP = "foldserve.startup"  # logger of the table at start-up


class OwnChoicesFilter(logging.Filter):
    """Drops vLLM's warnings about our own choices, which an operator can't change; --verbose shows them."""

    _BEGIN = (
        "CPU backend doesn't allow to use `torch.set_num_threads`",
        "Enforce eager set, disabling",
        "Inductor compilation was disabled by user settings",
        "Model Runner V2 requires Triton",
        "OMP_NUM_THREADS=",
        "Reset SSM cache type",
        "Triton is not installed. triton-cpu is expected",
        "Using custom scheduler class foldserve.",
        "VLLM_CPU_NUM_OF_RESERVED_CPU is less than",
    )

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno > logging.WARNING or not record.getMessage().startswith(self._BEGIN)


class OneLineFilter(logging.Filter):
    """Shortens to one line what vLLM logs each second with a traceback while file descriptors are used up."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.msg == "Error accepting a connection" and record.exc_info:
            record.msg, record.exc_info = f"{record.msg}: {record.exc_info[1]}", None
        return True


class TableFormatter(logging.Formatter):
    """The facts of a record, one per line, under its message."""

    def format(self, record: logging.LogRecord) -> str:
        facts: dict[str, str] = getattr(record, "facts", {})
        return "\n".join([f"foldserve: {record.getMessage()}", *(f"  {k:<11} {v}" for k, v in facts.items())])


def json_formatter() -> JsonFormatter:
    """One object a line: timestamp (ISO 8601, UTC), level, logger, process, request_id, message, and extra fields."""
    return JsonFormatter(
        "%(levelname)s %(name)s %(process)d %(message)s",
        rename_fields={"levelname": "level", "name": "logger", "process": "pid", "vllm_process_name": "process"},
        reserved_attrs=[*RESERVED_ATTRS, *_ONLY_FOR_TEXT],
        timestamp=True,
    )


def logging_config(log_format: str, level: str, vllm_level: str, *, color: bool = False) -> dict[str, Any]:
    """The configuration, for `dictConfig`: everything goes to standard output.

    Args:
        log_format: `text` or `json`.
        level: of our loggers.
        vllm_level: of vLLM's and uvicorn's loggers; all others log from WARNING on.
        color: for text on a terminal.
    """
    is_text = log_format == "text"
    text = {
        "()": f"vllm.logging_utils.{'ColoredFormatter' if color else 'NewLineFormatter'}",
        "format": _TEXT,
        "datefmt": "%m-%d %H:%M:%S",
        "log_level": level,
    }
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {
            "request_id": {"()": f"{_HERE}.context.RequestIdFilter"},
            "our_choices": {"()": f"{_HERE}.config.OwnChoicesFilter"},
            "one_line_each": {"()": f"{_HERE}.config.OneLineFilter"},
        },
        "formatters": {
            "chosen": text if is_text else {"()": f"{_HERE}.config.json_formatter"},
            "table": {"()": f"{_HERE}.config.TableFormatter"},
        },
        "handlers": {
            "vllm": {  # vLLM looks for this name before it draws its logo
                "class": "logging.StreamHandler",
                "stream": "ext://sys.stdout",
                "formatter": "chosen",
                "filters": ["request_id"],
            },
            "libraries": {  # its own level, since uvicorn sets its loggers' to what vLLM's options say
                "class": "logging.StreamHandler",
                "stream": "ext://sys.stdout",
                "formatter": "chosen",
                "filters": ["request_id", "one_line_each", *(["our_choices"] if vllm_level == "WARNING" else [])],
                "level": vllm_level,
            },
            "table": {"class": "logging.StreamHandler", "stream": "ext://sys.stdout", "formatter": "table"},
            "failure": {"()": f"{_HERE}.failure.FailureHandler"},
        },
        "loggers": {
            "foldserve": _logger(level),
            STARTUP: _logger(level, "table" if is_text else "vllm"),
            "vllm": _logger(vllm_level, "libraries", "failure"),
            "uvicorn": _logger(vllm_level, "libraries"),
        },
        "root": {"handlers": ["vllm"], "level": "WARNING"},
    }


def _logger(level: str, *handlers: str) -> dict[str, Any]:
    return {"handlers": list(handlers or ["vllm"]), "level": level, "propagate": False}


@contextmanager
def shared_logging_config(log_format: str, level: str | None, *, verbose: bool, own: bool) -> Iterator[None]:
    """Makes processes started inside log alike; enter it before vllm is imported.

    Args:
        level: None: what an operator needs, of vLLM only warnings unless `verbose` or in JSON.
        verbose: also vLLM's own lines.
        own: the user has a configuration of their own, which stays.
    """
    if own:
        yield
        return
    with TemporaryDirectory(prefix="foldserve-", dir=guardian.run_dir()) as directory:
        file = Path(directory) / "logging.json"
        quiet = level is None and not verbose and log_format == "text"
        levels = level or "INFO", "WARNING" if quiet else level or "INFO"
        file.write_text(json.dumps(logging_config(log_format, *levels, color=sys.stdout.isatty())))
        os.environ[VARIABLE] = str(file)
        try:
            yield
        finally:
            del os.environ[VARIABLE]
