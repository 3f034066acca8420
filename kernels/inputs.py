"""What the kernels take: dtypes, and strides in a form of which Triton compiles one variant."""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNED = 16
"""Elements; of offsets that are multiples of it the compiler knows that loads may be as wide as they get."""


def at_most_fp32(x: Tensor) -> None:
    """Refuses what fp32 does not hold.

    Raises:
        TypeError: x is in another dtype than fp16, bf16 or fp32.
    """
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"the kernels compute in fp32: give fp16, bf16 or fp32, not {x.dtype}")


def image_stride(x: Tensor) -> tuple[int, int]:
    """Stride from image to image of (B, n, d), as (units, elements of a unit).

    An image's stride depends on n, which changes from layer to layer; whether it is aligned must not follow from that,
    or each answer would be a variant of the kernel. The unit follows from the stride of tokens, which does not change.
    """
    stride, unit = x.stride(0), ALIGNED if x.stride(1) % ALIGNED == 0 and x.stride(0) % ALIGNED == 0 else 1
    return stride // unit, unit
