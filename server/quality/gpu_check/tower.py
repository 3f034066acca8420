"""The stage `tower`: the vision tower's CUDA graphs (`--tower-graphs`) against the tower without them."""

from __future__ import annotations

from typing import Any

from foldserve.server.quality.gpu_check.common import OURS, TRUE_FP32, StagePassed, engine, fp32_arguments
from foldserve.server.quality.gpu_check.job_runner import JobRunner, StageFailed
from foldserve.server.quality.gpu_check.jobs import EngineSpec, TowerJob, TowerResult
from foldserve.server.quality.gpu_check.load import load_engine
from foldserve.server.quality.gpu_check.shape import write_shape

_REDUCTION: dict[str, Any] = {"method": "folder", "ratio": 0.66, "positions": "keep"}
_REQUESTS = 40
_FP32 = 1e-4
"""Limit of the difference of embeddings, relative to the largest: a product may take another algorithm in a graph."""


def check_tower(job_runner: JobRunner) -> StagePassed:
    """Answers of the demo model in fp32, then times of LLaVA-1.5-7B's shape in bf16."""
    found: dict[str, Any] = {}
    small = engine(job_runner, enforce_eager=False, enable_prefix_caching=False, **fp32_arguments(job_runner))
    seen = _run(job_runner, "demo", small, found, **TRUE_FP32)
    if seen.alike < seen.requests:
        raise StageFailed(f"{seen.alike} of {seen.requests} answers have the ids of those without graphs", found)
    worst = max(row.difference for row in seen.rows)
    if not worst <= _FP32:
        raise StageFailed(f"embeddings in fp32 are off by {worst:.1g} of the largest", found)
    shape = write_shape(job_runner.folder / "llava-1.5-7b-shape")
    large = _run(job_runner, "7b-shape", load_engine(job_runner, shape), found)
    times = ", ".join(f"{row.eager_ms:.2f} -> {row.graph_ms:.2f} at {row.images}" for row in large.rows)
    return StagePassed(f"{seen.requests} answers alike; ms without -> with graphs, by images: {times}", found)


def _run(job_runner: JobRunner, name: str, plain: EngineSpec, found: dict[str, Any], **env: str) -> TowerResult:
    """The job's result, which `found` gets too; raises StageFailed unless one run replayed graphs and one did not."""
    settings = {"default_reduction": _REDUCTION, "tower_graphs": True}
    engine_spec = plain.model_copy(update={"settings": settings})
    spec = TowerJob(engine=engine_spec, reduction=_REDUCTION, requests=_REQUESTS)
    seen = job_runner.run(f"tower-{name}", "tower", spec, TowerResult, **OURS, **env)
    found[name] = seen.model_dump()
    if not seen.replays or seen.eager_replays:
        raise StageFailed(
            f"{name}: {seen.replays} graphs replayed with them, {seen.eager_replays} without: nothing was compared",
            found,
        )
    return seen
