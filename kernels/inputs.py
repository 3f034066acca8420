"""Inputs of the kernels: allowed dtypes, and strides in a form for which Triton compiles a single variant."""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNED = 16  # elements; the compiler uses the widest loads for offsets that are multiples of it


def at_most_fp32(x: Tensor) -> None:
    """Raises TypeError unless x is in fp16, bf16 or fp32."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"the kernels compute in fp32: give fp16, bf16 or fp32, not {x.dtype}")


def image_stride(x: Tensor) -> tuple[int, int]:
    """Stride between images of (B, n, d), as (units, elements per unit).

    The stride depends on n, which changes from layer to layer. If its alignment changed too, Triton would compile a
    variant for each. The unit depends on the stride between tokens, which is constant.
    """
    stride, unit = x.stride(0), ALIGNED if x.stride(1) % ALIGNED == 0 and x.stride(0) % ALIGNED == 0 else 1
    return stride // unit, unit
