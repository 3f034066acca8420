"""All stages, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from foldserve.server.quality.gpu_check.burst import check_burst
from foldserve.server.quality.gpu_check.common import StagePassed
from foldserve.server.quality.gpu_check.correctness import check_ratio_zero, check_reference, check_smoke
from foldserve.server.quality.gpu_check.job_runner import JobRunner
from foldserve.server.quality.gpu_check.load import measure_load
from foldserve.server.quality.gpu_check.on_gpu import check_graphs, check_kernels, check_machine, check_sync
from foldserve.server.quality.gpu_check.options import STAGES
from foldserve.server.quality.gpu_check.tower import check_tower

CPU_LIMIT_S = 600.0


@dataclass(frozen=True, slots=True)
class CheckStage:
    """One stage.

    Attributes:
        shows: what a pass means.
        limit_s: time limit on a GPU; on a CPU it is `CPU_LIMIT_S`.
        run: raises Failed.
        needs_gpu: why it needs a GPU, or "".
    """

    name: str
    shows: str
    limit_s: float
    run: Callable[[JobRunner], StagePassed]
    needs_gpu: str = ""


_MEASURES = "it measures a GPU"
_LIST = (
    CheckStage("machine", "vLLM's build fits this GPU, and what it reaches", 90, check_machine, _MEASURES),
    CheckStage("smoke", "methods of every kind serve, with the tokens that were planned", 120, check_smoke),
    CheckStage("ratio-0", "where nothing is reduced, foldserve is vLLM", 180, check_ratio_zero),
    CheckStage(
        "reference", "methods compute what plain PyTorch does: in chunks, preempted, cached", 150, check_reference
    ),
    CheckStage(
        "graphs", "engines with CUDA graphs answer as those without", 480, check_graphs, "a CPU has no CUDA graphs"
    ),
    CheckStage(
        "tower", "the tower's CUDA graphs compute what it does without", 300, check_tower, "a CPU has no CUDA graphs"
    ),
    CheckStage("sync", "no step waits for the GPU", 180, check_sync, "vLLM's detector of waits watches CUDA"),
    CheckStage("kernels", "Triton kernels compute what torch does", 180, check_kernels, "Triton does not run on a CPU"),
    CheckStage("burst", "the tower gets no more images at once than start-up measured", 120, check_burst),
    CheckStage(
        "load",
        "reduction gains speed, and ratio 0 loses none",
        900,
        measure_load,
        f"{_MEASURES}; --model DIR tries one",
    ),
)
ALL: Mapping[str, CheckStage] = {stage.name: stage for stage in _LIST}
assert tuple(ALL) == STAGES
