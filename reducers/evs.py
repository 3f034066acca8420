"""Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference (EVS).

Keeps the tokens that differ most from those at the same place one frame earlier.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from foldserve.reducers import fold
from foldserve.reducers.geometry import VisionGeometry
from foldserve.reducers.method import AcrossFrames

if TYPE_CHECKING:
    from foldserve.reducers.plan import Plan

_FIRST_FRAME = 255.0  # score of its tokens, as in the authors' code; 1 - cosine is at most 2


def change(x: Tensor, frames: int) -> Tensor:
    """1 - cosine of each token to the token at the same place one frame earlier.

    Args:
        x: (B, frames * n, d), any float dtype, frame by frame.

    Returns:
        (B, frames * n), at least fp32; 255 in the first frame.
    """
    video = x.view(len(x), frames, -1, x.shape[-1])  # (B, frames, n, d)
    at_once = max(1, fold.AT_ONCE // max(1, video[:, 0].numel()))
    first = fold.at_least_fp32(video[:, 0, :, 0])
    scores = [torch.full_like(first, _FIRST_FRAME)]
    for frame in range(1, frames, at_once):
        some = fold.at_least_fp32(video[:, frame - 1 : frame + at_once])
        scores.append(1 - F.cosine_similarity(some[:, 1:], some[:, :-1], dim=-1, eps=1e-8).flatten(1))
    return torch.cat(scores, dim=1)


def most_changed(score: Tensor, kept: int) -> Tensor:
    """(B, n) -> (B, kept): indices of the highest scores, ascending; ties go to the earlier token."""
    return score.argsort(dim=-1, descending=True, stable=True)[:, :kept].sort(dim=-1).values


class EVS(AcrossFrames):
    """Keeps the whole first frame."""

    name = "evs"
    summary = "Of a video, keeps its first frame and the vision tokens that change most from a frame to the next."
    paper = "Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference"

    def min_kept(self, geometry: VisionGeometry) -> tuple[int, str]:
        return geometry.tokens // geometry.frames, "the first frame"

    def reduce(self, x: Tensor, plan: Plan, width: int | None = None) -> fold.Reduced:
        return fold.keep(x, most_changed(change(x[..., :width], plan.frames), plan.kept))
