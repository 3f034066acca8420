"""Capacity measured on the running engine: vLLM's start-up log assumes prompts without reduction or withdrawal."""

from __future__ import annotations

import time
from typing import Any

from prometheus_client import Gauge
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import SchedulerStats

from foldserve.server.pressure import pressure

_RESIDENT = Gauge(
    "foldserve_resident_capacity_sequences",
    "Sequences like those now running that the KV cache would hold at once: running / share of blocks in use.",
    ["engine"],
    multiprocess_mode="mostrecent",
)
_PRESSURE = Gauge(
    "foldserve_pressure",
    "0 to 4: how long requests have waited for a full KV cache.",
    multiprocess_mode="max",
)


class _LastStats:
    """`time.monotonic` of the last statistics from an engine."""

    at = 0.0


last_stats = _LastStats()


class ResidentCapacity(StatLoggerBase):
    """Entry point of `vllm.stat_logger_plugins`; one per engine of a data-parallel server."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        self._gauge = _RESIDENT.labels(str(engine_index))

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: object,
        mm_cache_stats: object = None,
        engine_idx: int = 0,
        **_: Any,
    ) -> None:
        last_stats.at = time.monotonic()
        if scheduler_stats is not None:
            pressure.observe(scheduler_stats.num_waiting_reqs, scheduler_stats.kv_cache_usage, last_stats.at)
            _PRESSURE.set(pressure.level(last_stats.at))
        if scheduler_stats is not None and scheduler_stats.num_running_reqs and scheduler_stats.kv_cache_usage:
            self._gauge.set(scheduler_stats.num_running_reqs / scheduler_stats.kv_cache_usage)

    def log_engine_initialized(self) -> None:
        """Nothing is known before the first request."""
