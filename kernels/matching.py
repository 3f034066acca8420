"""Bipartite matching without storing the score matrix: cosines and their row maxima, tile by tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foldserve.kernels.inputs import at_most_fp32, image_stride

BLOCK_EVEN, BLOCK_ODD, BLOCK_BYTES = 64, 64, 128
"""Tokens, and bytes per token, that a program of `_match` holds: the smallest tile that Hopper's tensor cores multiply
asynchronously; not tuned on a device yet."""

BLOCK_TOKENS, MOST_CHANNELS = 4, 1024  # that a program of `_norms` holds; not tuned on a device yet

BLOCK_BEST = 256  # even tokens per program of `_best`; not tuned on a device yet

EPS = 1e-12  # torch.nn.functional.normalize


def match(metric: Tensor, *, class_token: bool = False, penalty: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`foldserve.reducers.fold.match` in three launches; fp32 results of fp16, bf16 or fp32.

    First the norm of each token; then for each tile of 64 even by 64 odd tokens the best odd token of each even one;
    then the best over the tiles. Each token is read n / 128 times, from the L2 cache. The reference is 6 or 7 torch
    operators, each at least a launch; it writes and reads again the normalised metric and the score matrix,
    B (n / 2)^2 x 4 bytes. Products accumulate in fp32: fp16 and bf16 on tensor cores, fp32 without TF32.

    Raises:
        TypeError: the metric is in fp64.
        ValueError: there is no odd token.
    """
    at_most_fp32(metric)
    if metric.shape[1] < 2:
        raise ValueError(f"a matching needs an even token and an odd one, not {metric.shape[1]} tokens")
    norm = _token_norms(metric)
    tile_score, tile_partner = _tile_matches(metric, norm)
    return _best_matches(tile_score, tile_partner, norm, penalty, class_token)


def _token_norms(metric: Tensor) -> Tensor:
    """(B, n) fp32."""
    batch, n, width = metric.shape
    stride, unit = image_stride(metric)
    norm = metric.new_empty(batch, n, dtype=torch.float32)
    _norms[triton.cdiv(n, BLOCK_TOKENS), batch](
        metric,
        norm,
        n,
        width,
        stride,
        *metric.stride()[1:],
        UNIT=unit,
        EPS=EPS,
        BLOCK_TOKENS=BLOCK_TOKENS,
        BLOCK_WIDTH=min(MOST_CHANNELS, triton.next_power_of_2(width)),
    )
    return norm


def _tile_matches(metric: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """(B, tiles, even) fp32 scores and int32 partners: the best odd token of each tile for each even token."""
    batch, n, width = metric.shape
    even, tiles = (n + 1) // 2, triton.cdiv(n // 2, BLOCK_ODD)
    stride, unit = image_stride(metric)
    score = metric.new_empty(batch, tiles, even, dtype=torch.float32)
    partner = metric.new_empty(batch, tiles, even, dtype=torch.int32)
    _match[triton.cdiv(even, BLOCK_EVEN), tiles, batch](
        metric,
        norm,
        score,
        partner,
        n,
        width,
        stride,
        *metric.stride()[1:],
        UNIT=unit,
        BLOCK_EVEN=BLOCK_EVEN,
        BLOCK_ODD=BLOCK_ODD,
        BLOCK_WIDTH=BLOCK_BYTES // metric.element_size(),
    )
    return score, partner


def _best_matches(
    tile_score: Tensor, tile_partner: Tensor, norm: Tensor, penalty: Tensor | None, class_token: bool
) -> tuple[Tensor, Tensor]:
    """(B, even) fp32 scores and int64 partners: the best over the tiles."""
    batch, tiles, even = tile_score.shape
    score = tile_score.new_empty(batch, even)
    partner = tile_score.new_empty(batch, even, dtype=torch.int64)
    _best[triton.cdiv(even, BLOCK_BEST), batch](
        tile_score,
        tile_partner,
        norm,
        penalty,
        score,
        partner,
        norm.shape[1],
        tiles,
        *((0, 0) if penalty is None else penalty.stride()),
        CLASS_TOKEN=class_token,
        BLOCK=BLOCK_BEST,
    )
    return score, partner


@triton.jit(do_not_specialize=["n", "image_stride"])
def _norms(
    metric: tl.tensor,
    norm: tl.tensor,
    n: int,
    width: int,
    image_stride: int,
    token_stride: int,
    channel_stride: int,
    UNIT: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
) -> None:
    image = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    rows = metric + image * image_stride * UNIT + i[:, None] * token_stride
    square = tl.zeros((BLOCK_TOKENS,), tl.float32)
    for first_channel in range(0, width, BLOCK_WIDTH):
        c = first_channel + tl.arange(0, BLOCK_WIDTH)
        x = tl.load(rows + c[None, :] * channel_stride, (i < n)[:, None] & (c < width)[None, :], 0.0).to(tl.float32)
        square += tl.sum(x * x, axis=1)
    tl.store(norm + image * n + i, tl.maximum(tl.math.sqrt_rn(square), EPS), i < n)


@triton.jit(do_not_specialize=["n", "image_stride"])
def _match(
    metric: tl.tensor,
    norm: tl.tensor,
    tile_score: tl.tensor,
    tile_partner: tl.tensor,
    n: int,
    width: int,
    image_stride: int,
    token_stride: int,
    channel_stride: int,
    UNIT: tl.constexpr,
    BLOCK_EVEN: tl.constexpr,
    BLOCK_ODD: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
) -> None:
    """Best odd token of the tile for each even one; +inf stands for NaN, which torch.max also treats as largest."""
    even, odd = (n + 1) // 2, n // 2
    image = tl.program_id(2).to(tl.int64)
    a = tl.program_id(0) * BLOCK_EVEN + tl.arange(0, BLOCK_EVEN)
    b = tl.program_id(1) * BLOCK_ODD + tl.arange(0, BLOCK_ODD)
    metric += image * image_stride * UNIT
    a_rows = metric + 2 * a[:, None] * token_stride  # (BLOCK_EVEN, 1)
    b_rows = metric + (2 * b[None, :] + 1) * token_stride  # (1, BLOCK_ODD)
    dot = tl.zeros((BLOCK_EVEN, BLOCK_ODD), tl.float32)
    for first_channel in range(0, width, BLOCK_WIDTH):
        c = first_channel + tl.arange(0, BLOCK_WIDTH)
        x = tl.load(a_rows + c[None, :] * channel_stride, (a < even)[:, None] & (c < width)[None, :], 0.0)
        y = tl.load(b_rows + c[:, None] * channel_stride, (b < odd)[None, :] & (c < width)[:, None], 0.0)
        dot = tl.dot(x, y, dot, input_precision="ieee")  # no TF32, which would round fp32 inputs
    b_norm = tl.load(norm + image * n + 2 * b + 1, b < odd, 1.0)
    cosine = tl.math.div_rn(dot, b_norm[None, :])  # `_best` divides by the even token's norm: the order is the same
    cosine = tl.where(cosine == cosine, cosine, float("inf"))
    cosine = tl.where((b < odd)[None, :], cosine, float("-inf"))
    best, best_b = tl.max(cosine, axis=1, return_indices=True)  # ties go to the first
    to = (image * tl.num_programs(1) + tl.program_id(1)) * even + a
    tl.store(tile_score + to, best, a < even)
    tl.store(tile_partner + to, tl.program_id(1) * BLOCK_ODD + best_b, a < even)


@triton.jit(
    do_not_specialize=["n", "tiles", "penalty_image_stride", "penalty_token_stride"],
    do_not_specialize_on_alignment=["penalty"],
)
def _best(
    tile_score: tl.tensor,
    tile_partner: tl.tensor,
    norm: tl.tensor,
    penalty: tl.tensor,
    score: tl.tensor,
    partner: tl.tensor,
    n: int,
    tiles: int,
    penalty_image_stride: int,
    penalty_token_stride: int,
    CLASS_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    even = (n + 1) // 2
    image = tl.program_id(1).to(tl.int64)
    a = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    best_b = tl.zeros((BLOCK,), tl.int32)
    for tile in range(0, tiles):
        of_tile = (image * tiles + tile) * even + a
        here = tl.load(tile_score + of_tile, a < even, float("-inf"))
        here_b = tl.load(tile_partner + of_tile, a < even, 0)
        best_b = tl.where(here > best, here_b, best_b)  # ties go to the earlier tile
        best = tl.maximum(here, best)
    result = tl.math.div_rn(best, tl.load(norm + image * n + 2 * a, a < even, 1.0))
    result = tl.where(best == float("inf"), float("nan"), result)
    if penalty is not None:
        own = penalty + image * penalty_image_stride + 2 * a * penalty_token_stride
        result -= tl.load(own, a < even, 0.0).to(tl.float32)
    if CLASS_TOKEN:
        result = tl.where(a == 0, float("-inf"), result)
    tl.store(score + image * even + a, result, a < even)
    tl.store(partner + image * even + a, best_b.to(tl.int64), a < even)
