"""What the kernels compute in: fp32, whatever half precision comes in."""

from __future__ import annotations

import torch
from torch import Tensor


def at_most_fp32(x: Tensor) -> None:
    """Refuses what fp32 does not hold.

    Raises:
        TypeError: x is in another dtype than fp16, bf16 or fp32.
    """
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"the kernels compute in fp32: give fp16, bf16 or fp32, not {x.dtype}")
