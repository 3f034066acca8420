"""foldserve's own Prometheus metrics; vLLM serves them on `/metrics`, summed over its API servers."""

from __future__ import annotations

import asyncio
from functools import lru_cache

from prometheus_client import Counter, Histogram

from foldserve.server import output
from foldserve.server.api.usage import VisionTokens
from foldserve.server.engine.family import Modality
from foldserve.server.engine.kv_cost import KvCost

_VISION_TOKENS = Counter(
    "foldserve_vision_tokens",
    "Vision tokens of accepted requests: encoded (at ratio 0), kept for the decoder, withdrawn at layer K.",
    ["stage", "method", "modality"],
)
_KV_SAVED = Counter(
    "foldserve_kv_bytes_saved",
    "KV cache that accepted requests do not need because of their reduction and withdrawal, before rounding to blocks.",
)
_AUTO = Counter(
    "foldserve_auto_requests",
    'Requests with `ratio: "auto"`, by the calibrated group (`other`: of none) and by the steps that load took off.',
    ["group", "pressure"],
)
_TTFT = Histogram(
    "foldserve_time_to_first_token_seconds",
    "Time from the arrival of a request to its first token, by the ratio really applied to its images and videos.",
    ["ratio_bucket"],
    buckets=(0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.4, 0.6, 1.0, 1.5, 2.5, 4.0, 6.0, 10.0, 20.0, 40.0, 80.0),
)
_SCALED = Counter("foldserve_images_scaled", "Images above the limits that were scaled down: --oversized scale.")
_DROPPED_LINES = Counter(
    "foldserve_log_lines_dropped",
    "Lines that API processes did not write, because nobody read their output in time or it could not be written.",
)
_COUNT_S = 1.0
_RATIO_BOUNDS = (0.25, 0.5, 0.75, 1.0)


def ratio_bucket(vision: VisionTokens | None) -> str:
    """A bounded label: `no_image` (nor video), `0`, or the upper bound of the ratio's bucket, 0.25 wide."""
    if vision is None:
        return "no_image"
    if vision.kept == vision.encoded:
        return "0"
    return next(f"<={bound}" for bound in _RATIO_BOUNDS if vision.ratio <= bound)


def observe_accepted(vision: VisionTokens | None, cost: KvCost) -> None:
    """Counts the vision tokens of a request that goes to the engine, and the KV cache that its reduction saves."""
    if vision is None:
        return
    for plan, modality, withdrawn in zip(vision.plans, vision.modalities, vision.withdrawn_each, strict=True):
        encoded, kept, gone = _counters(plan.method, modality)
        encoded.inc(plan.encoded)
        kept.inc(plan.kept)
        gone.inc(withdrawn)
    if vision.auto is not None:
        _AUTO.labels(vision.auto.label, str(vision.auto.pressure or 0)).inc()
    _KV_SAVED.inc(cost.saved_bytes(vision.encoded - vision.kept, vision.withdrawn))


@lru_cache  # a label is looked up slowly; methods are few
def _counters(method: str, modality: Modality) -> list[Counter]:
    return [_VISION_TOKENS.labels(stage, method, modality) for stage in ("encoded", "kept", "withdrawn")]


def observe_first_token(vision: VisionTokens | None, seconds: float) -> None:
    _TTFT.labels(ratio_bucket(vision)).observe(seconds)


async def count_dropped_lines() -> None:
    """Updates the counter each second. Not where lines are dropped, which may be in a signal handler."""
    counted = 0
    while True:
        dropped = output.dropped_lines()
        _DROPPED_LINES.inc(dropped - counted)
        counted = dropped
        await asyncio.sleep(_COUNT_S)


def observe_scaled() -> None:
    _SCALED.inc()
