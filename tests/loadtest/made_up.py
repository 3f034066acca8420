"""Made-up figures of load tests."""

from __future__ import annotations

from collections.abc import Sequence

from foldserve.loadtest.grid import CONTROL, RATIO_0, Load, Variant
from foldserve.loadtest.report.estimates import Estimate
from foldserve.loadtest.summary import PointSummary


def about(value: float) -> Estimate:
    return Estimate(value, 0.9 * value, 1.1 * value)


def row(variant: Variant, load: Load, speed: float, *, has_cache: bool) -> PointSummary:
    """Of a server that is `speed` times as fast as at ratio 0."""
    times = {"requests_per_s": about(1.2 * speed), "ttft_s_p50": about(0.9 * (load.concurrency or 1) / speed)}
    cache = {"kv_share": about(0.01 / speed), "resident_when_full": about(80 * speed)} if has_cache else {}
    limit = {"requests_per_s": 1.1 * speed, "kv_share": 1 / speed, "resident_when_full": speed}
    to_ratio_0 = {"requests_per_s": about(speed)}
    return PointSummary(
        variant, load, 2, 64, 0, times | cache, to_ratio_0, {}, limit if variant.server == "foldserve" else {}
    )


def rows(
    methods: Sequence[str], concurrency: Sequence[int] = (1, 8, 64), ratios: Sequence[float] = (0.25, 0.5, 0.9)
) -> list[PointSummary]:
    """The cache is seen under the highest load only."""
    variants = [CONTROL, RATIO_0, *(Variant("foldserve", method, r) for method in methods for r in ratios)]
    variants += [Variant("foldserve", "folder", r, True) for r in ratios]
    return [
        row(v, Load(n), 1 + v.ratio * (1 + 0.001 * i), has_cache=n == max(concurrency))
        for n in concurrency
        for i, v in enumerate(variants)
    ]
