"""Bipartite matching without its matrix of scores: cosine and row maximum in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foldserve.kernels.dtypes import at_most_fp32

BLOCK_EVEN, BLOCK_ODD, BLOCK_BYTES = 16, 64, 128
"""Tokens, and bytes of each, that a program holds at once: what sm_90 has registers for; not tuned on a device yet."""

EPS = 1e-12  # torch.nn.functional.normalize


def match(metric: Tensor, *, class_token: bool = False, penalty: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`foldserve.reducers.fold.match` in one launch; fp32 results of fp16, bf16 or fp32.

    A program takes 16 even tokens past all odd ones, and scales each product by the norms that it finds on the way.
    Floor of memory traffic: B n d elements of the metric read once (programs share the odd tokens in the L2 cache),
    6 n B bytes written. The reference is 6 or 7 operators of torch, each a launch or more; it writes the normalised
    metric and the matrix of scores, B (n / 2)^2 x 4 bytes, and reads both again.

    Products are exact: fp16 and bf16 fit into TF32, so tensor cores may multiply them, and fp32 is multiplied in
    fp32. They are accumulated in fp32.

    Raises:
        TypeError: the metric is in fp64.
        ValueError: there is no odd token.
    """
    at_most_fp32(metric)
    batch, n, width = metric.shape
    if n < 2:
        raise ValueError(f"a matching needs an even token and an odd one, not {n} tokens")
    even = (n + 1) // 2
    score = metric.new_empty(batch, even, dtype=torch.float32)
    partner = metric.new_empty(batch, even, dtype=torch.int64)
    _match[triton.cdiv(even, BLOCK_EVEN), batch](
        metric,
        penalty,
        score,
        partner,
        n,
        width,
        *metric.stride(),
        *((0, 0) if penalty is None else penalty.stride()),
        CLASS_TOKEN=class_token,
        PRECISION="ieee" if metric.dtype == torch.float32 else "tf32",
        EPS=EPS,
        BLOCK_EVEN=BLOCK_EVEN,
        BLOCK_ODD=BLOCK_ODD,
        BLOCK_WIDTH=BLOCK_BYTES // metric.element_size(),
    )
    return score, partner


@triton.jit(do_not_specialize=["n"])
def _match(
    metric: tl.tensor,
    penalty: tl.tensor,
    score: tl.tensor,
    partner: tl.tensor,
    n: int,
    width: int,
    image_stride: int,
    token_stride: int,
    channel_stride: int,
    penalty_image_stride: int,
    penalty_token_stride: int,
    CLASS_TOKEN: tl.constexpr,
    PRECISION: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_EVEN: tl.constexpr,
    BLOCK_ODD: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
) -> None:
    even, odd = (n + 1) // 2, n // 2
    image = tl.program_id(1).to(tl.int64)
    a = tl.program_id(0) * BLOCK_EVEN + tl.arange(0, BLOCK_EVEN)
    b = tl.arange(0, BLOCK_ODD)
    channels = tl.arange(0, BLOCK_WIDTH)
    metric += image * image_stride
    a_rows = metric + 2 * a[:, None] * token_stride  # (BLOCK_EVEN, 1)
    b_rows = metric + (2 * b[None, :] + 1) * token_stride  # (1, BLOCK_ODD)

    best = tl.full((BLOCK_EVEN,), float("-inf"), tl.float32)
    best_b = tl.zeros((BLOCK_EVEN,), tl.int32)
    a_square = tl.zeros((BLOCK_EVEN,), tl.float32)
    for first_b in range(0, odd, BLOCK_ODD):
        in_range = first_b + b < odd
        dot = tl.zeros((BLOCK_EVEN, BLOCK_ODD), tl.float32)
        a_square = tl.zeros((BLOCK_EVEN,), tl.float32)
        b_square = tl.zeros((BLOCK_ODD,), tl.float32)
        for first_channel in range(0, width, BLOCK_WIDTH):
            c = first_channel + channels
            x = tl.load(a_rows + c[None, :] * channel_stride, (a < even)[:, None] & (c < width)[None, :], 0.0)
            b_at = b_rows + 2 * first_b * token_stride + c[:, None] * channel_stride
            y = tl.load(b_at, in_range[None, :] & (c < width)[:, None], 0.0)
            x, y = x.to(tl.float32), y.to(tl.float32)
            dot = tl.dot(x, y, dot, input_precision=PRECISION)
            a_square += tl.sum(x * x, axis=1)
            b_square += tl.sum(y * y, axis=0)
        b_norm = tl.maximum(tl.math.sqrt_rn(b_square), EPS)
        cosine = tl.math.div_rn(dot, b_norm[None, :])
        cosine = tl.where(cosine == cosine, cosine, float("inf"))  # NaN is the largest, as for torch.max
        cosine = tl.where(in_range[None, :], cosine, float("-inf"))
        here, here_b = tl.max(cosine, axis=1, return_indices=True)  # of equals the first
        best_b = tl.where(here > best, first_b + here_b, best_b)
        best = tl.maximum(here, best)

    result = tl.math.div_rn(best, tl.maximum(tl.math.sqrt_rn(a_square), EPS))
    result = tl.where(best == float("inf"), float("nan"), result)
    if penalty is not None:
        own = penalty + image * penalty_image_stride + 2 * a * penalty_token_stride
        result -= tl.load(own, a < even, 0.0).to(tl.float32)
    if CLASS_TOKEN:
        result = tl.where(a == 0, float("-inf"), result)
    tl.store(score + image * even + a, result, a < even)
    tl.store(partner + image * even + a, best_b.to(tl.int64), a < even)
