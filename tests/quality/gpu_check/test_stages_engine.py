"""Stages with real engines on a CPU, in this process. In processes of their own: `make test-runners`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from foldserve.server.engine.encoder_budget import EncoderBudget
from foldserve.server.engine.tower_graphs import TowerGraphs
from foldserve.server.quality.engine.gpu_check.engine import model_of, start_engine
from foldserve.server.quality.gpu_check.burst import check_burst
from foldserve.server.quality.gpu_check.common import engine
from foldserve.server.quality.gpu_check.correctness import check_reference
from foldserve.server.quality.gpu_check.job_runner import StageFailed
from foldserve.server.quality.gpu_check.jobs import EngineSpec, LoadJob, TowerJob, TowerResult
from foldserve.server.quality.gpu_check.load import load_engine
from foldserve.server.quality.gpu_check.options import GpuCheckOptions
from foldserve.server.quality.gpu_check.references import References
from tests import qwen_checkpoint
from tests.engine.cuda.recorded import Recorded
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


@pytest.fixture
def recorded_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded operators in the place of CUDA graphs, captured once the engine is there."""
    monkeypatch.setattr("foldserve.server.engine.tower_graphs.CudaGraph", Recorded)
    monkeypatch.setattr("foldserve.server.engine.tower_graphs._conflicts", lambda config: iter(()))

    def started(spec: EngineSpec) -> Any:
        llm = start_engine(spec)
        model_of(llm).tower_graphs.capture(None)
        return llm

    monkeypatch.setattr("foldserve.server.quality.engine.gpu_check.tower.start_engine", started)


def tower_result(folder: Path) -> TowerResult:
    from foldserve.server.quality.engine.gpu_check.tower import run

    reduction = {"method": "folder", "ratio": 0.66, "positions": "keep"}
    settings = {"default_reduction": reduction, "tower_graphs": True}
    small = engine(InProcess(folder), dtype="float32", max_num_batched_tokens=1200, enable_prefix_caching=False)
    return run(
        TowerJob(engine=small.model_copy(update={"settings": settings}), reduction=reduction, requests=9, tokens=3)
    )


def test_graphs_of_the_tower(tmp_path: Path, recorded_graphs: None) -> None:
    seen = tower_result(tmp_path)
    assert (seen.requests, seen.alike, seen.eager_replays) == (9, 9, 0) and seen.replays
    assert [row.images for row in seen.rows] == [1, 2, 4, 8]
    assert max(row.difference for row in seen.rows) < 1e-6 < min(row.graph_ms for row in seen.rows)


def test_graphs_of_the_tower_that_read_old_pixels(
    tmp_path: Path, recorded_graphs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(graphs: TowerGraphs, pixels: torch.Tensor) -> torch.Tensor:
        graphs.replays[len(pixels)] += 1
        return graphs._graphs[len(pixels)].replay().clone()

    monkeypatch.setattr(TowerGraphs, "replay", stale)
    assert min(row.difference for row in tower_result(tmp_path).rows) > 1e-2


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
