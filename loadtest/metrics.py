"""Reads the server's /metrics: counters before and after a block, gauges in between."""

from __future__ import annotations

import threading
from collections import defaultdict
from types import TracebackType

import httpx
from prometheus_client.parser import text_string_to_metric_families

from foldserve.loadtest import keys

_COUNTERS = (
    "vllm:num_preemptions_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:mm_cache_queries_total",
    "vllm:mm_cache_hits_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_queue_time_seconds_sum",
    "vllm:request_prefill_time_seconds_sum",
    "vllm:request_decode_time_seconds_sum",
    "foldserve_kv_bytes_saved_total",
)
_BY_STAGE = "foldserve_vision_tokens_total"
KV_USE, RUNNING, WAITING = "vllm:kv_cache_usage_perc", "vllm:num_requests_running", "vllm:num_requests_waiting"
_WANTED = (*_COUNTERS, _BY_STAGE, KV_USE, RUNNING, WAITING)


def read(text: str) -> tuple[dict[str, float], dict[str, float]]:
    """Counters and gauges of a page, each summed over its labels; vision tokens by stage, as `vision_encoded`.

    The rest of the page is not parsed: that would take CPU time from the server being measured.
    """
    wanted = "".join(f"{line}\n" for line in text.splitlines() if line.startswith(_WANTED))
    counters: dict[str, float] = defaultdict(float)
    gauges: dict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(wanted):
        for sample in family.samples:
            if sample.name in _COUNTERS:
                counters[sample.name] += sample.value
            elif sample.name == _BY_STAGE:
                counters[f"vision_{sample.labels['stage']}"] += sample.value
            elif sample.name in (KV_USE, RUNNING, WAITING):
                gauges[sample.name] += sample.value
    return dict(counters), dict(gauges)


class MetricsWatch:
    """Context that reads /metrics at its start, at its end and every `every_s` in between.

    A server without that page has no figures. A ValueError is raised if the page refuses the key.

    Attributes:
        counters: growth of the counters, after the end.
        gauges: values of the gauges while requests ran.
    """

    def __init__(self, url: str, every_s: float = 1.0) -> None:
        self._page, self._every_s = f"{url}/metrics", every_s
        self._client = httpx.Client(timeout=30, headers=keys.for_metrics())
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self.counters: dict[str, float] = {}
        self.gauges: dict[str, list[float]] = defaultdict(list)

    def __enter__(self) -> MetricsWatch:
        self._before, _ = self._read()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        try:
            after, _ = self._read()
        finally:
            self._client.close()
        self.counters = {name: value - self._before.get(name, 0) for name, value in after.items()}

    def _poll(self) -> None:
        while not self._over.wait(self._every_s):
            try:
                _, gauges = self._read()
            except httpx.TransportError:  # too busy to answer: no figure
                continue
            if not gauges.get(RUNNING):
                continue
            for name, value in gauges.items():
                self.gauges[name].append(value)

    def _read(self) -> tuple[dict[str, float], dict[str, float]]:
        answer = self._client.get(self._page)
        if answer.status_code in (401, 403):
            raise ValueError(f"{self._page} asks for a key with the scope `metrics`: set {keys.METRICS}")
        return read(answer.text) if answer.status_code == 200 else ({}, {})
