"""Capacity from what the scheduler reports."""

from __future__ import annotations

from unittest.mock import Mock

from prometheus_client import REGISTRY
from vllm.v1.metrics.stats import SchedulerStats

from foldserve.server.engine.stats import ResidentCapacity


def test_capacity_is_running_over_usage_and_stays_when_idle() -> None:
    logger = ResidentCapacity(Mock(), engine_index=7)
    logger.record(SchedulerStats(num_running_reqs=6, kv_cache_usage=0.25), None)
    logger.record(SchedulerStats(num_running_reqs=0, kv_cache_usage=0.0), None)
    logger.record(None, None)
    assert REGISTRY.get_sample_value("foldserve_resident_capacity_sequences", {"engine": "7"}) == 24
