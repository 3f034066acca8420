"""Stages with real engines on a CPU, in this process. In processes of their own: `make test-runners`."""

from __future__ import annotations

from pathlib import Path

import pytest

from foldserve.server.engine.encoder_budget import EncoderBudget
from foldserve.server.quality.gpu_check.burst import check_burst
from foldserve.server.quality.gpu_check.correctness import check_reference
from foldserve.server.quality.gpu_check.job_runner import StageFailed
from foldserve.server.quality.gpu_check.jobs import LoadJob
from foldserve.server.quality.gpu_check.load import load_engine
from foldserve.server.quality.gpu_check.options import GpuCheckOptions
from foldserve.server.quality.gpu_check.references import References
from tests import qwen_checkpoint
from tests.quality.gpu_check.job_runners import InProcess


def test_engine_meets_the_references(tmp_path: Path) -> None:
    passed = check_reference(InProcess(tmp_path))
    known = References.load()
    assert passed.details["compared"] == len(known.cases) * known.cases[0].tokens
    assert max(passed.details["errors"].values()) < 1e-3
    assert passed.details["preemptions"]


def test_a_burst_stays_within_the_bound(tmp_path: Path) -> None:
    seen = check_burst(InProcess(tmp_path)).details
    assert seen["encoded"] == seen["profiled"] == 3 < seen["scheduled"]


def test_a_burst_without_the_bound_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unbound = EncoderBudget(10**6, 10**6, 10**6)
    monkeypatch.setattr("foldserve.server.engine.model.encoder_budget", lambda config: unbound)
    with pytest.raises(StageFailed, match="the tower had"):
        check_burst(InProcess(tmp_path))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_load_measures(tiny_llava: Path, tmp_path: Path, family: str) -> None:
    """Withdrawn sequences take fewer blocks; a smaller prompt too."""
    from foldserve.server.quality.engine.gpu_check.load import run

    model = tiny_llava if family == "llava" else qwen_checkpoint.write(tmp_path / family, family)
    engine = load_engine(InProcess(tmp_path, GpuCheckOptions(device="cpu", model=model)), model)
    asked = ({"ratio": 0}, {"ratio": 0.9}, {"ratio": 0, "withdraw": True})
    spec = LoadJob(
        engine=engine.model_copy(update={"withdraw_layer": 2}),
        reductions=asked,
        image_px=168 if family == "llava" else 448,
        requests=4,
        tokens=3,
        rounds=1,
        singles=1,
    )
    full, reduced, withdrawn = run(spec).rows
    tokens = 144 if family == "llava" else 256  # and 30 of text
    kept = tokens - int(tokens * 0.9)
    assert [row.prompt_tokens for row in (full, reduced, withdrawn)] == [30 + tokens, 30 + kept, 30 + tokens]
    assert full.sequences < withdrawn.sequences < reduced.sequences
    for row in (full, reduced, withdrawn):
        assert min(row.requests_per_s, row.ttft_ms, row.itl_ms) > 0
