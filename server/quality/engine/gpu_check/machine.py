"""Job `machine`: the GPU's name, and the FLOP/s and bandwidth that it reaches."""

from __future__ import annotations

import torch
import vllm._custom_ops  # noqa: F401  loads vLLM's compiled operators

from foldserve.server.quality.engine.gpu_check.timing import median_s
from foldserve.server.quality.gpu_check.jobs import MachineJob, MachineResult

_SIDE = 8192
_COPIED = 2 << 30


def run(spec: MachineJob) -> MachineResult:
    major, minor = torch.cuda.get_device_capability()
    a, b = (torch.randn(_SIDE, _SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.randint(0, 256, (_COPIED,), device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    return MachineResult(
        device=torch.cuda.get_device_name(),
        capability=f"{major}.{minor}",
        torch=torch.__version__,
        gemm_tflops=2 * _SIDE**3 / median_s(lambda: a @ b) / 1e12,
        copy_gb_per_s=2 * _COPIED / median_s(lambda: target.copy_(source)) / 1e9,  # read and written
        silu_error=_silu_error(),
    )


def _silu_error() -> float:
    x = torch.randn(7, 2 * 11008, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(7, 11008, device="cuda", dtype=torch.bfloat16)
    torch.ops._C.silu_and_mul(out, x)
    gate, up = x.float().chunk(2, -1)
    right = torch.nn.functional.silu(gate) * up
    return float((out.float() - right).norm() / right.norm())
