"""How long the device takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch


def median_s(call: Callable[[], object]) -> float:
    """Seconds until the device is done: median of ten calls, after three to warm up."""
    times = []
    for _ in range(13):
        _wait()
        start = time.perf_counter()
        call()
        _wait()
        times.append(time.perf_counter() - start)
    return median(times[3:])


def _wait() -> None:
    if torch.accelerator.is_available():  # else a CPU, which is done when the call returns
        torch.accelerator.synchronize()
