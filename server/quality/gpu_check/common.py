"""Engines and environment variables that stages share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from foldserve.server.quality.demo.checkpoint import CHECKPOINT
from foldserve.server.quality.gpu_check.job_runner import JobRunner
from foldserve.server.quality.gpu_check.jobs import AnswerJob, AnswerResult, EngineSpec

STOCK = {"VLLM_PLUGINS": ""}
"""Environment variables of a job that runs plain vLLM."""
OURS = {"VLLM_PLUGINS": "foldserve"}

TRUE_FP32 = {"TRITON_F32_DEFAULT": "ieee"}
"""For jobs in fp32: Triton's matrix products are TF32 by default, which moves this model's margins by up to 0.06."""


@dataclass(frozen=True, slots=True)
class StagePassed:
    """Result of a stage that passed: one line, and details for the JSON file and the page."""

    line: str
    details: Mapping[str, Any] = field(default_factory=dict)


def engine(job_runner: JobRunner, withdraw_layer: int | None = None, **arguments: Any) -> EngineSpec:
    """An engine of the demo model, which fits any GPU."""
    options = job_runner.options
    asked = {"attention_backend": options.attention_backend, "mm_encoder_attn_backend": options.mm_encoder_attn_backend}
    defaults: dict[str, Any] = {
        "dtype": "bfloat16",
        "max_model_len": 1024,
        "max_num_seqs": 32,
        "block_size": 32,
        "kv_cache_memory_bytes": 256 << 20,
        "enforce_eager": True,
    }
    given = {name: value for name, value in asked.items() if value}
    return EngineSpec(model=CHECKPOINT, withdraw_layer=withdraw_layer, arguments=defaults | given | arguments)


def fp32_arguments(job_runner: JobRunner) -> dict[str, Any]:
    """Engine arguments for fp32, with attention backends that support it."""
    if job_runner.options.device == "cpu":
        return {"dtype": "float32"}
    return {"dtype": "float32", "attention_backend": "TRITON_ATTN", "mm_encoder_attn_backend": "TORCH_SDPA"}


def ask_ours(job_runner: JobRunner, name: str, ask: AnswerJob, **env: str) -> AnswerResult:
    return job_runner.run(name, "answer", ask, AnswerResult, **OURS, **env)
