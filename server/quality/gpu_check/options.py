"""What a user may ask of the check."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from foldserve.server.options import option

STAGES = ("machine", "smoke", "ratio-0", "reference", "graphs", "tower", "sync", "kernels", "burst", "load")
"""In the order in which they run: those that say most about a machine come first."""


@dataclass(frozen=True, slots=True)
class GpuCheckOptions:
    """Raises ValueError if what is asked can't be done."""

    stages: tuple[str, ...] = option(STAGES, "STAGE,STAGE,...", "those to run")
    model_runner: Literal["auto", "v1", "v2"] = option("auto", None, "vLLM's model runner; auto: vLLM's choice")
    model: Path | None = option(
        None,
        "DIR",
        "checkpoint of the stage load, of which only configuration and tokenizer are read (default: the shape of "
        "LLaVA-1.5-7B)",
    )
    attention_backend: str | None = option(None, "NAME", "as in `vllm serve`; the fp32 reference takes TRITON_ATTN")
    mm_encoder_attn_backend: str | None = option(
        None, "NAME", "as in `vllm serve`; the fp32 reference takes TORCH_SDPA"
    )
    gpu_memory_utilization: float = option(0.9, "SHARE", "of the GPU's memory that the stage load may take")
    budget: float | None = option(
        None, "SECONDS", "for all stages together: what does not fit is skipped (default: each stage has its own limit)"
    )
    device: Literal["cuda", "cpu"] = option(
        "cuda", None, "cpu: try the check itself without a GPU, with the stages that can run there"
    )
    output: Path = option(
        Path("gpu-check"), "DIR", "gets gpu-check.json, gpu-check.md, plots, and a log of each process"
    )

    def __post_init__(self) -> None:
        for stage in self.stages:
            if stage not in STAGES:
                raise ValueError(f"--stages are {', '.join(STAGES)}, not {stage!r}")
        if not 0 < self.gpu_memory_utilization < 1:
            raise ValueError(f"--gpu-memory-utilization lies between 0 and 1, not at {self.gpu_memory_utilization}")
        if self.budget is not None and self.budget <= 0:
            raise ValueError(f"--budget must be more than 0 seconds, not {self.budget:g}")
        if self.device == "cpu" and self.model_runner == "v2":
            raise ValueError("--model-runner v2 needs Triton, which does not run on a CPU: leave it out")
        if self.model is not None and not (self.model / "config.json").is_file():
            raise ValueError(f"--model {self.model} is no checkpoint: there is no config.json in it")
