"""vLLM's arguments, set up for access and life cycle."""

from __future__ import annotations

import multiprocessing
from argparse import Namespace
from collections.abc import Callable
from ctypes import c_double
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event
from typing import NoReturn

from foldserve.server.access import Access
from foldserve.server.api.auth.counters import SharedCounters
from foldserve.server.api.logs.config import VARIABLE

SHARED = "foldserve_shared"  # attribute of vLLM's arguments that carries `SharedState` to the API processes

_GRACE_S = 10
"""vLLM kills a process this long after our own timeout: time to end answers that were cut off, and the engine."""

_REFUSED = {
    "api_key": "--api-key: keys come from the file of --api-keys",
    "enable_log_requests": "--enable-log-requests: what requests say is never logged",
    "enable_log_outputs": "--enable-log-outputs: what answers say is never logged",
    "enable_request_id_headers": "--enable-request-id-headers: responses always have the header",
    "log_config_file": f"--log-config-file: name the file in {VARIABLE}, or use --log-format and --log-level",
    "log_level": "log-level in vLLM's configuration: it is an option of foldserve serve",
    "logging_config": f"--logging-config: use --log-format and --log-level, or name a file in {VARIABLE}",
    "shutdown_timeout": "shutdown-timeout in vLLM's configuration: it is an option of foldserve serve",
}


@dataclass(frozen=True, slots=True)
class SharedState:
    """State that the processes of one server share. It can travel only in the arguments of a spawned process.

    Attributes:
        counters: requests in flight, and those that count towards a rate.
        engine_died: set when the engine has ended although nobody asked the server to.
        last_output: `time.monotonic` of the last engine output in any API process.
    """

    counters: SharedCounters = field(default_factory=SharedCounters)
    engine_died: Event = field(default_factory=lambda: multiprocessing.get_context("spawn").Event())
    last_output: c_double = field(default_factory=lambda: multiprocessing.get_context("spawn").RawValue(c_double, 0.0))


def prepare(args: Namespace, access: Access, refuse: Callable[[str], NoReturn]) -> SharedState:
    """Fills in vLLM's arguments, and refuses those that would undo what the server promises."""
    for name, why in _REFUSED.items():
        if getattr(args, name, None):
            refuse(f"not taken: {why}")
    args.shutdown_timeout = access.shutdown_timeout_s + _GRACE_S
    args.disable_uvicorn_access_log = True  # ours has one line per request, with its id
    shared = SharedState()
    setattr(args, SHARED, shared)
    return shared
