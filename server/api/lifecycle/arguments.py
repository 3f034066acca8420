"""vLLM's arguments as access and life cycle need them."""

from __future__ import annotations

import multiprocessing
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import NoReturn

from vllm import envs
from vllm.logger import DEFAULT_LOGGING_CONFIG

from foldserve.server.access import Access
from foldserve.server.api.auth.counters import SharedCounters
from foldserve.server.api.logs.config import write_config
from foldserve.server.settings import CONFIG_KEY

SHARED = "foldserve_shared"
"""The attribute of vLLM's arguments that carries `Shared` to the API processes."""

_GRACE_S = 10
"""What vLLM waits longer than we do before it kills a process: to end answers that were cut off, and the engine."""

_REFUSED = {
    "api_key": "--api-key: keys come from the file of --api-keys",
    "enable_log_requests": "--enable-log-requests: what requests say is never logged",
    "enable_log_outputs": "--enable-log-outputs: what answers say is never logged",
    "enable_request_id_headers": "--enable-request-id-headers: responses always have the header",
    "shutdown_timeout": "shutdown-timeout in vLLM's configuration: it is an option of foldserve serve",
}


@dataclass(frozen=True, slots=True)
class Shared:
    """What the processes of one server share; it can only travel in the arguments of a process that is spawned.

    Attributes:
        counters: requests in flight, and those that count towards a rate.
        engine_died: set when the engine has ended although nobody asked the server to.
    """

    counters: SharedCounters = field(default_factory=SharedCounters)
    engine_died: Event = field(default_factory=lambda: multiprocessing.get_context("spawn").Event())


def prepare(args: Namespace, access: Access, refuse: Callable[[str], NoReturn]) -> Shared:
    """Fills in vLLM's arguments; one that would undo what the server promises is refused."""
    for name, why in _REFUSED.items():
        if getattr(args, name):
            refuse(f"not taken: {why}")
    args.shutdown_timeout = access.shutdown_timeout_s + _GRACE_S
    args.disable_uvicorn_access_log = True  # ours has one line per request, with its id
    shared = Shared()
    setattr(args, SHARED, shared)
    return shared


def configure_logs(args: Namespace, directory: Path, refuse: Callable[[str], NoReturn]) -> None:
    """Makes all processes log alike, unless the user has a configuration of their own.

    Args:
        directory: for a file that lives as long as the server.
    """
    access = Access.from_config(args.additional_config[CONFIG_KEY]["access"])
    given = getattr(args, "logging_config", None)
    own = getattr(args, "log_config_file", None)
    own = own or (given.pylogging_config_file if given else envs.VLLM_LOGGING_CONFIG_PATH)
    configures = given.configure_logging if given else envs.VLLM_CONFIGURE_LOGGING
    if own or not configures:
        if access.log_format != "text":
            refuse("--log-format json and a logging configuration of your own don't go together: leave one out")
        return
    level = getattr(args, "log_level", None) or (given.log_level if given else envs.VLLM_LOGGING_LEVEL)
    log_format = given.formatter if given and access.log_format == "text" else access.log_format
    args.log_config_file = str(directory / "logging.json")
    write_config(Path(args.log_config_file), DEFAULT_LOGGING_CONFIG, log_format, level)
