"""The one logging configuration of all our processes, in text or JSON, made from vLLM's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

_ONLY_FOR_TEXT = ("color_message", "fileinfo", "request_tag")
_HERE = "foldserve.server.api.logs"


def json_formatter() -> JsonFormatter:
    """One object a line: timestamp (ISO 8601, UTC), level, logger, process, request_id, message, and what was added."""
    return JsonFormatter(
        "%(levelname)s %(name)s %(process)d %(message)s",
        rename_fields={"levelname": "level", "name": "logger", "process": "pid", "vllm_process_name": "process"},
        rename_fields_keep_missing=False,
        reserved_attrs=[*RESERVED_ATTRS, *_ONLY_FOR_TEXT],
        timestamp=True,
    )


def write_config(file: Path, vllm: Mapping[str, Any], log_format: str, level: str) -> None:
    """Writes a `dictConfig` for vLLM's `--log-config-file`, which its processes and uvicorn apply.

    Args:
        vllm: vLLM's default configuration, whose handler and text formatters are kept.
        log_format: `text` or `json`.
        level: of vLLM's and our loggers; others log from WARNING on.
    """
    config = deepcopy(dict(vllm))
    handler = config["handlers"]["vllm"]
    handler |= {"level": "NOTSET", "filters": ["request_id"]}
    config["filters"] = {"request_id": {"()": f"{_HERE}.context.RequestIdFilter"}}
    for formatter in config["formatters"].values():
        formatter["format"] = formatter["format"].replace("%(message)s", "%(request_tag)s%(message)s")
        formatter["log_level"] = level
    if log_format == "json":
        config["formatters"]["json"] = {"()": f"{_HERE}.config.json_formatter"}
        handler["formatter"] = "json"
    ours = {"handlers": ["vllm"], "level": level, "propagate": False}
    config["loggers"] = {name: dict(ours) for name in ("vllm", "foldserve", "uvicorn")}
    config["root"] = {"handlers": ["vllm"], "level": "WARNING"}
    file.write_text(json.dumps(config))
