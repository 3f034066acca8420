"""Sequential picks in one launch: one program per image makes all of them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from foldserve.kernels.inputs import at_most_fp32
from foldserve.reducers import divprune

MOST_TOKENS = 4096
"""Largest image whose distances fit into a program's registers; `reducers.cosines` holds no larger matrix."""


def farthest_first(matrix: Tensor, first: Tensor, kept: int, weight: Tensor | None = None) -> Tensor:
    """`foldserve.reducers.divprune.farthest_first` in one launch; TypeError for fp64.

    Minimum memory traffic: 4 n kept B bytes read, a row of the matrix per pick. The reference is 5 torch operators per
    pick, 8 with weights.
    """
    at_most_fp32(matrix)
    batch, n, _ = matrix.shape
    if n > MOST_TOKENS:
        return divprune.farthest_first.reference(matrix, first, kept, weight)
    picks = first.new_empty(batch, kept)
    own_weight = None if weight is None else weight.contiguous()
    _farthest_first[batch,](
        matrix.contiguous(), first.contiguous(), own_weight, picks, n, kept, BLOCK=MOST_TOKENS, num_warps=8
    )
    return picks


@triton.jit(do_not_specialize=["n", "kept"], do_not_specialize_on_alignment=["matrix", "first", "weight"])
def _farthest_first(
    matrix: tl.tensor,
    first: tl.tensor,
    weight: tl.tensor,
    picks: tl.tensor,
    n: int,
    kept: int,
    BLOCK: tl.constexpr,
) -> None:
    """Picked tokens have distance -inf; NaN is the largest score, as for torch.max."""
    image = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    inside = index < n
    matrix += image * n * n
    if weight is not None:
        own_weight = tl.load(weight + image * n + index, inside, 0.0)
    pick = tl.load(first + image).to(tl.int32)
    tl.store(picks + image * kept, pick.to(tl.int64))
    distance = tl.where(inside, float("inf"), float("-inf"))
    for k in range(1, kept):
        cosine = tl.load(matrix + pick.to(tl.int64) * n + index, inside, 0.0)
        distance = tl.minimum(distance, 1.0 - cosine)  # ignores NaN, as torch.fmin
        distance = tl.where(index == pick, float("-inf"), distance)
        score = distance
        if weight is not None:
            score = tl.where(distance == float("-inf"), distance, distance * own_weight)
        score = tl.where(score == score, score, float("inf"))
        _, pick = tl.max(score, axis=0, return_indices=True)  # ties go to the first
        tl.store(picks + image * kept + k, pick.to(tl.int64))
