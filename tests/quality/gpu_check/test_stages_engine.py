"""Stages with real engines on a CPU, in this process. In processes of their own: `make test-runners`."""

from __future__ import annotations

from pathlib import Path

import pytest

from foldserve.server.quality.gpu_check.bench import Failed
from foldserve.server.quality.gpu_check.burst import burst
from foldserve.server.quality.gpu_check.correctness import reference
from foldserve.server.quality.gpu_check.jobs import Load
from foldserve.server.quality.gpu_check.load import load_engine
from foldserve.server.quality.gpu_check.options import GpuCheckOptions
from foldserve.server.quality.gpu_check.references import References
from tests.quality.gpu_check.bench import InProcess


def test_engine_meets_the_references(tmp_path: Path) -> None:
    passed = reference(InProcess(tmp_path))
    known = References.load()
    assert passed.details["compared"] == len(known.cases) * known.cases[0].tokens
    assert max(passed.details["errors"].values()) < 1e-3
    assert passed.details["preemptions"]


def test_a_burst_stays_within_the_bound(tmp_path: Path) -> None:
    seen = burst(InProcess(tmp_path)).details
    assert seen["encoded"] == seen["profiled"] == 3 < seen["scheduled"]


def test_a_burst_without_the_bound_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foldserve.server.engine.model.profiled_tokens", lambda config: 10**6)
    with pytest.raises(Failed, match="the tower had"):
        burst(InProcess(tmp_path))


def test_load_measures(tiny_llava: Path, tmp_path: Path) -> None:
    """Withdrawn sequences take fewer blocks; a smaller prompt too."""
    from foldserve.server.quality.engine.gpu_check.load import run

    engine = load_engine(InProcess(tmp_path, GpuCheckOptions(device="cpu", model=tiny_llava)), tiny_llava)
    asked = ({"ratio": 0}, {"ratio": 0.9}, {"ratio": 0, "withdraw": True})
    spec = Load(
        engine=engine.model_copy(update={"withdraw_layer": 2}),
        reductions=asked,
        image_px=168,
        requests=4,
        tokens=3,
        rounds=1,
        singles=1,
    )
    full, reduced, withdrawn = run(spec).rows
    assert (full.prompt_tokens, reduced.prompt_tokens, withdrawn.prompt_tokens) == (174, 45, 174)
    assert full.sequences < withdrawn.sequences < reduced.sequences
    for row in (full, reduced, withdrawn):
        assert min(row.requests_per_s, row.ttft_ms, row.itl_ms) > 0
