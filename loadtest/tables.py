"""The report's tables, and all figures as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from foldserve.loadtest.report.estimates import Estimate
from foldserve.loadtest.report.tables import NONE, Table
from foldserve.loadtest.summary import PointSummary

_MAIN = [
    "load", "variant", "requests/s", "to ratio 0", "FLOPs allow", "to plain vLLM", "TTFT p50, s", "E2E p50, s",
    "vision tokens", "failed",
]  # fmt: skip
_CLIENT = ["load", "variant", *(f"{name} p{p}, s" for name in ("TTFT", "ITL", "E2E") for p in (50, 90, 99))]
_SERVER = [
    "load", "variant", "KV of a request, %", "to ratio 0", "KV allows", "requests in a full KV", "to ratio 0",
    "KV in use, %", "preemptions", "prefix hits, %", "image cache hits, %", "queue, s", "prefill, s", "decode, s",
    "API CPU, ms", "to plain vLLM", "engine CPU, s",
]  # fmt: skip


def tables(rows: Sequence[PointSummary], note: str) -> list[Table]:
    """All tables, with `note` below the last."""
    return [
        Table("Throughput and latency", _MAIN, [_main_cells(row) for row in rows], labels=2, key=2),
        Table("What the client saw", _CLIENT, [_client_cells(row) for row in rows], labels=2, key=2),
        Table("What the server tells, per request", _SERVER, [_server_cells(row) for row in rows], 2, 2, note),
    ]


def _main_cells(row: PointSummary) -> list[str]:
    return [
        *_names(row),
        _show(row.figures.get("requests_per_s"), 3),
        _show(row.to_ratio_0.get("requests_per_s")),
        _number(row.limit.get("requests_per_s")),
        _show(row.to_vllm.get("requests_per_s")),
        _show(row.figures.get("ttft_s_p50")),
        _show(row.figures.get("e2e_s_p50")),
        _vision(row),
        f"{row.failures} of {row.requests}",
    ]


def _client_cells(row: PointSummary) -> list[str]:
    names = [f"{name}_s_p{p}" for name in ("ttft", "itl", "e2e") for p in (50, 90, 99)]
    return [*_names(row), *(_show(row.figures.get(name), 3) for name in names)]


def _server_cells(row: PointSummary) -> list[str]:
    return [
        *_names(row),
        _show(row.figures.get("kv_share"), 3, 100),
        _show(row.to_ratio_0.get("kv_share")),
        _number(row.limit.get("kv_share")),
        _show(row.figures.get("resident_when_full"), 1),
        _show(row.to_ratio_0.get("resident_when_full")),
        _show(row.figures.get("kv_use"), 1, 100),
        _show(row.figures.get("preemptions")),
        _show(row.figures.get("prefix_cache_hit_share"), 1, 100),
        _show(row.figures.get("mm_cache_hit_share"), 1, 100),
        *(_show(row.figures.get(f"{stage}_s")) for stage in ("queue", "prefill", "decode")),
        _show(row.figures.get("api_cpu_s"), 1, 1000),
        _show(row.to_vllm.get("api_cpu_s")),
        _show(row.figures.get("engine_cpu_s")),
    ]


def as_csv(rows: Sequence[PointSummary]) -> str:
    """All figures, one line per point and figure."""
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    head = ["load", "label", "server", "method", "ratio", "withdraw", "rounds", "requests", "failures", "figure", "of"]
    out.writerow([*head, "value", "low", "high"])
    for row in rows:
        v = row.variant
        names = [str(row.load), v.label, v.server, v.method or "", v.ratio, v.withdraw]
        counts = [row.rounds, row.requests, row.failures]
        for of, figures in (("itself", row.figures), ("ratio 0", row.to_ratio_0), ("plain vLLM", row.to_vllm)):
            for name, each in figures.items():
                out.writerow([*names, *counts, name, of, each.value, each.low, each.high])
        for name, value in row.limit.items():
            out.writerow([*names, *counts, name, "ratio 0, predicted", value, "", ""])
    return text.getvalue()


def _names(row: PointSummary) -> list[str]:
    return [str(row.load), row.variant.label]


def _vision(row: PointSummary) -> str:
    """Encoded, kept and withdrawn tokens per request, without intervals, since they are counted."""
    stages = [row.figures.get(f"vision_{stage}") for stage in ("encoded", "kept", "withdrawn")]
    if None in stages:
        return NONE
    encoded, kept, withdrawn = (stage.value for stage in stages if stage is not None)
    return f"{encoded:g} → {kept:g}" + (f", {withdrawn:g} withdrawn" if withdrawn else "")


def _show(estimate: Estimate | None, digits: int = 2, scale: float = 1) -> str:
    return NONE if estimate is None else estimate.show(digits, scale)


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"
