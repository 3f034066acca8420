"""The stage `load`: measures plain vLLM, and foldserve at several ratios with and without withdrawal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from foldserve.server.quality.gpu_check.common import OURS, STOCK, StagePassed
from foldserve.server.quality.gpu_check.job_runner import JobRunner, StageFailed
from foldserve.server.quality.gpu_check.jobs import EngineSpec, LoadJob, LoadResult, LoadRow
from foldserve.server.quality.gpu_check.shape import write_shape

RATIOS = (0.0, 0.5, 0.66, 0.9)
WITHDRAWN_RATIOS = (0.0, 0.66)
LEAST_OF_STOCK = 0.95
"""Least requests/s at ratio 0, as a share of plain vLLM's."""

_ON_CPU = {"requests": 16, "tokens": 16, "rounds": 1, "singles": 3}
"""Only to try the stage: its figures say little on a CPU."""

_ANY_SIZE_PX = 672
"""Image size for models that take any: 576 tokens of Qwen2.5-VL."""

Row = dict[str, Any]


def measure_load(job_runner: JobRunner) -> StagePassed:
    model = job_runner.options.model or write_shape(job_runner.folder / "llava-1.5-7b-shape")
    layer = _layers(model) // 2
    size = _ON_CPU if job_runner.options.device == "cpu" else {}
    plain = LoadJob(engine=load_engine(job_runner, model), image_px=_image_px(model), reductions=({},), **size)
    reduced = plain.model_copy(update={"reductions": tuple({"ratio": ratio} for ratio in RATIOS)})
    withdrawing = plain.model_copy(
        update={
            "engine": plain.engine.model_copy(update={"withdraw_layer": layer}),
            "reductions": tuple({"ratio": ratio, "withdraw": True} for ratio in WITHDRAWN_RATIOS),
        }
    )
    theirs = plain.model_copy(update={"engine": plain.engine.model_copy(update={"foldserve": False})})
    rows: list[Row] = []
    found = {"model": str(model), "requests": plain.requests, "tokens": plain.tokens, "rows": rows}
    try:
        for name, spec, ratios, env in (
            ("plain vLLM", theirs, (0.0,), STOCK),
            ("foldserve", reduced, RATIOS, OURS),
            (f"withdrawn at K={layer}", withdrawing, WITHDRAWN_RATIOS, OURS),
        ):
            measured = job_runner.run(f"load-{name.partition(' ')[0]}", "load", spec, LoadResult, **env)
            rows += [_row(name, ratio, row, measured) for ratio, row in zip(ratios, measured.rows, strict=True)]
        return StagePassed(check_gains(rows), found)
    except StageFailed as failed:  # what was measured is worth seeing
        raise StageFailed(str(failed), found) from failed


def check_gains(rows: list[Row]) -> str:
    """Sums up the gains; raises Failed if foldserve is slower than vLLM at ratio 0 or reduction gains nothing."""
    stock, zero, *reduced = (row["requests_per_s"] for row in rows if "withdrawn" not in row["engine"])
    if zero < LEAST_OF_STOCK * stock:
        raise StageFailed(f"{zero:.1f} requests/s at ratio 0, {zero / stock:.0%} of plain vLLM's {stock:.1f}")
    if reduced[-1] <= zero:
        raise StageFailed(
            f"{reduced[-1]:.1f} requests/s at ratio {RATIOS[-1]:g}, {zero:.1f} at 0: reduction brings nothing"
        )
    gains = ", ".join(f"{rate / stock:.2f} at {ratio:g}" for ratio, rate in zip(RATIOS, (zero, *reduced), strict=True))
    return f"requests/s of plain vLLM's {stock:.1f}: {gains}"


def _row(engine: str, ratio: float, row: LoadRow, found: LoadResult) -> Row:
    return {
        "engine": engine,
        "runner": found.runner,
        "ratio": ratio,
        **row.model_dump(),
        "peak_bytes": found.peak_bytes,
    }


def load_engine(job_runner: JobRunner, model: Path) -> EngineSpec:
    """An engine with the user's settings, else vLLM's, and without a prefix cache, which would skip prefills."""
    options = job_runner.options
    arguments: dict[str, Any] = {
        "load_format": "dummy",
        "dtype": "bfloat16",
        "max_model_len": 2048,
        "max_num_seqs": 64,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "attention_backend": options.attention_backend,
        "mm_encoder_attn_backend": options.mm_encoder_attn_backend,
        "enable_prefix_caching": False,
        "limit_mm_per_prompt": {"image": 1},
    }
    if options.device == "cpu":
        arguments |= {"kv_cache_memory_bytes": 256 << 20, "enforce_eager": True}
    return EngineSpec(model=model, arguments={name: value for name, value in arguments.items() if value is not None})


def _layers(model: Path) -> int:
    return int(_config(model)["text_config"]["num_hidden_layers"])


def _image_px(model: Path) -> int:
    return int(_config(model)["vision_config"].get("image_size", _ANY_SIZE_PX))


def _config(model: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    return config
