"""From records to figures: one row per point, each figure with its interval and its ratios to the bases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from foldserve.loadtest.grid import CONTROL, RATIO_0, GridPoint, Load, Variant
from foldserve.loadtest.metrics import KV_USE, RUNNING, WAITING
from foldserve.loadtest.prediction import MeanRequest, ModelShape
from foldserve.loadtest.record import Record
from foldserve.loadtest.report.estimates import Estimate
from foldserve.loadtest.statistics import ResampledFigure, gaps, mean, quantile, quotient, rate, resample_rounds, runs

_PERCENTILES = (50, 90, 99)
_FULL = 0.9
"""The KV cache counts as full from this share of blocks in use."""
_QUEUE = 0.2
"""From this ratio of waiting to running requests, the cache limits the running ones, not the load."""
_STAGES = {
    "queue_s": "vllm:request_queue_time_seconds_sum",
    "prefill_s": "vllm:request_prefill_time_seconds_sum",
    "decode_s": "vllm:request_decode_time_seconds_sum",
}


@dataclass(frozen=True, slots=True)
class PointSummary:
    """One point over all its rounds.

    Attributes:
        figures: by name; times in seconds, counts per request unless the name says otherwise.
        to_ratio_0, to_vllm: ratios of the figures to those of a base at the same load.
        limit: ratio to ratio 0 that FLOPs and KV bytes predict, by figure.
    """

    variant: Variant
    load: Load
    rounds: int
    requests: int
    failures: int
    figures: dict[str, Estimate]
    to_ratio_0: dict[str, Estimate]
    to_vllm: dict[str, Estimate]
    limit: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return {"label": self.variant.label} | asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> PointSummary:
        """Raises KeyError or TypeError if `fields` are not from `to_json`."""
        read: dict[str, Any] = {name: fields[name] for name in ("rounds", "requests", "failures", "limit")}
        for base in ("figures", "to_ratio_0", "to_vllm"):
            read[base] = {name: Estimate(**each) for name, each in fields[base].items()}
        return cls(variant=Variant(**fields["variant"]), load=Load(**fields["load"]), **read)


def summarise(records: Mapping[GridPoint, Sequence[Record]], shape: ModelShape | None) -> list[PointSummary]:
    figures = {point: _figures(rounds) for point, rounds in records.items()}
    return [_row(point, records, figures, shape) for point in records]


def _row(
    point: GridPoint,
    records: Mapping[GridPoint, Sequence[Record]],
    figures: Mapping[GridPoint, dict[str, ResampledFigure]],
    shape: ModelShape | None,
) -> PointSummary:
    bases = [GridPoint(base, point.load) for base in (RATIO_0, CONTROL)]
    ratios = [_ratios(figures[point], figures.get(base, {})) for base in bases]
    rounds = records[point]
    limit = {}
    if shape is not None and point.variant.server == "foldserve" and bases[0] in records:
        limit = _limit(shape, _mean_request(rounds), _mean_request(records[bases[0]]))
    return PointSummary(
        variant=point.variant,
        load=point.load,
        rounds=len(rounds),
        requests=sum(len(record.sent.e2e_s) + len(record.sent.errors) for record in rounds),
        failures=sum(len(record.sent.errors) for record in rounds),
        figures={name: each.estimate() for name, each in figures[point].items()},
        to_ratio_0=ratios[0],
        to_vllm=ratios[1],
        limit=limit,
    )


def _ratios(own: dict[str, ResampledFigure], base: dict[str, ResampledFigure]) -> dict[str, Estimate]:
    """Ratios of the figures that both have, unless the base is 0 in a resample."""
    return {name: (own[name] / base[name]).estimate() for name in own if name in base and base[name].drawn.all()}


def _limit(shape: ModelShape, own: MeanRequest, base: MeanRequest) -> dict[str, float]:
    return {
        "requests_per_s": shape.flops(base) / shape.flops(own),
        "resident_when_full": shape.kv_elements(base) / shape.kv_elements(own),
        "kv_share": shape.kv_elements(own) / shape.kv_elements(base),
    }


def _mean_request(rounds: Sequence[Record]) -> MeanRequest:
    def per_request(counter: str) -> float:
        return sum(_counted(record, counter) for record in rounds) / len(rounds)

    answered = sum(len(record.sent.e2e_s) for record in rounds)
    prompt = sum(sum(record.sent.prompt_tokens) for record in rounds) / answered
    output = sum(sum(record.sent.output_tokens) for record in rounds) / answered
    kept = per_request("vision_kept")
    return MeanRequest(per_request("vision_encoded"), kept, per_request("vision_withdrawn"), prompt - kept, output)


def _counted(record: Record, counter: str) -> float:
    """Growth of a counter per answered request."""
    return record.counters.get(counter, 0.0) / len(record.sent.e2e_s)


def _figures(rounds: Sequence[Record]) -> dict[str, ResampledFigure]:
    """The figures that every round has values for."""
    each = [record.sent for record in rounds]
    found = {"requests_per_s": resample_rounds([runs(gaps(sent.start_s, sent.e2e_s)) for sent in each], rate)}
    times = {
        "ttft_s": [[[value] for value in sent.ttft_s] for sent in each],
        "itl_s": [[itl for itl in sent.itl_s if itl] for sent in each],
        "e2e_s": [[[value] for value in sent.e2e_s] for sent in each],
    }
    for name, by_round in times.items():
        if all(by_round):
            found |= {f"{name}_p{p}": resample_rounds(by_round, quantile(p / 100)) for p in _PERCENTILES}
    for name, values in _per_round(rounds).items():
        found[name] = resample_rounds([[[value]] for value in values], mean)
    return found | _of_cache(rounds, found)


def _of_cache(rounds: Sequence[Record], known: Mapping[str, ResampledFigure]) -> dict[str, ResampledFigure]:
    """Figures of the KV cache: its use, a request's share of it, and how many requests a full one holds.

    A request takes its blocks step by step during prefill. So blocks in use / running requests is a request's share
    only if requests decode for longer than they prefill.
    """
    seen = [_looks(record) for record in rounds]
    if not all(seen):
        return {}
    found = {"kv_use": resample_rounds([[[use] for use, _, _ in looks] for looks in seen], mean)}
    times = [known.get(name) for name in ("decode_s", "prefill_s")]
    if times[0] is not None and times[1] is not None and times[0].value > times[1].value:
        found["kv_share"] = resample_rounds([[[use, running] for use, running, _ in looks] for looks in seen], quotient)
    full = [
        [[running] for use, running, waiting in looks if use >= _FULL and waiting >= _QUEUE * running] for looks in seen
    ]
    if all(full):
        found["resident_when_full"] = resample_rounds(full, mean)
    return found


def _looks(record: Record) -> list[tuple[float, float, float]]:
    """(share of blocks in use, running requests, waiting requests) for each reading of the gauges."""
    gauges = [record.gauges.get(name, []) for name in (KV_USE, RUNNING, WAITING)]
    return [*zip(*gauges, strict=True)] if len({len(values) for values in gauges}) == 1 else []


def _per_round(rounds: Sequence[Record]) -> dict[str, list[float]]:
    """Figures with one value per round."""
    found = {}
    for stage in ("encoded", "kept", "withdrawn"):
        if all(f"vision_{stage}" in record.counters for record in rounds):
            found[f"vision_{stage}"] = [_counted(record, f"vision_{stage}") for record in rounds]
    for name, counter in _STAGES.items():
        if all(counter in record.counters for record in rounds):
            found[name] = [_counted(record, counter) for record in rounds]
    for cache in ("prefix_cache", "mm_cache"):
        asked = [record.counters.get(f"vllm:{cache}_queries_total", 0.0) for record in rounds]
        if all(asked):
            hits = [record.counters[f"vllm:{cache}_hits_total"] for record in rounds]
            found[f"{cache}_hit_share"] = [hit / all_ for hit, all_ in zip(hits, asked, strict=True)]
    if all("vllm:num_preemptions_total" in record.counters for record in rounds):
        found["preemptions"] = [_counted(record, "vllm:num_preemptions_total") for record in rounds]
    for kind in ("api", "engine"):
        if all(kind in record.cpu_s for record in rounds):
            found[f"{kind}_cpu_s"] = [record.cpu_s[kind] / len(record.sent.e2e_s) for record in rounds]
    return found
