"""`worker_cls` of foldserve's engines, by device."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from vllm.config import VllmConfig
from vllm.platforms import current_platform

WORKERS: Mapping[Literal["cpu", "cuda"], str] = MappingProxyType(
    {"cpu": f"{__package__}.worker_cpu.FoldWorker", "cuda": f"{__package__}.worker_cuda.FoldWorker"}
)
"""Their V1 runners keep positions, mask padding rows and withdraw; for model runner V2 the model's state does."""


def device() -> Literal["cpu", "cuda"]:
    """What this machine computes on."""
    return "cpu" if current_platform.is_cpu() else "cuda"


def is_ours(vllm_config: VllmConfig) -> bool:
    """Whether the engine's worker is one of `WORKERS`, or another of foldserve's."""
    return str(vllm_config.parallel_config.worker_cls).startswith("foldserve.")
