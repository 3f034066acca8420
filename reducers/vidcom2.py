"""Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large Language Models (VidCom2).

Keeps the tokens least similar to the mean of the video and of their frame. Distinct frames keep more tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from foldserve.reducers import fold
from foldserve.reducers.geometry import VisionGeometry
from foldserve.reducers.method import AcrossFrames

if TYPE_CHECKING:
    from foldserve.reducers.plan import Plan

_WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1, 2)  # variances of the Gaussians

_TEMPERATURE = 0.01


def likeness(x: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """Similarity of each token to the mean of its video and of its frame: a sum of Gaussians of the distance.

    Compares normalised tokens on the half of the channels with the least variance over the video.

    Args:
        x: (B, frames * n, d), any float dtype, frame by frame.

    Returns:
        to_video, to_frame: (B, frames, n), at least fp32.
    """
    channels = _steadiest(x)
    frame_means = torch.cat([some.mean(dim=2) for some in _unit(x, frames, channels)], dim=1)  # (B, frames, d // 2)
    video_mean = frame_means.mean(dim=1)[:, None, None]
    means = torch.split(frame_means.unsqueeze(2), _frames_at_once(x, frames), dim=1)
    to_video, to_frame = [], []
    for some, own_means in zip(_unit(x, frames, channels), means, strict=True):
        to_video.append(_gaussians(some - video_mean))
        to_frame.append(_gaussians(some - own_means))
    return torch.cat(to_video, dim=1), torch.cat(to_frame, dim=1)


def budgets(to_video: Tensor, retention: float) -> Tensor:
    """(B, frames, n) similarities to the video -> (B, frames) int64 tokens that each frame keeps, at least one.

    Frames less similar to the video keep more. The sum is near retention * frames * n.
    """
    n = to_video.shape[-1]
    share = (-to_video.mean(dim=-1) / _TEMPERATURE).softmax(dim=-1)
    share = (retention * (1 + share - share.mean(dim=-1, keepdim=True))).clamp_max(1)
    return (share * n).round().long().clamp(1, n)


def within_budget(score: Tensor, budget: Tensor) -> Tensor:
    """(B, frames, n), (B, frames) -> bool: the tokens of lowest score in each frame; ties go to the earlier token."""
    order = score.argsort(dim=-1, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(score.shape[-1], device=score.device).expand_as(order)
    )
    return rank < budget.unsqueeze(-1)


def vidcom2(x: Tensor, frames: int, kept: int, retention: float | None = None) -> Tensor:
    """(B, frames * n, d) -> (B, kept) int64 indices of the tokens that stay, ascending.

    Tokens within the frames' budgets come first, then the others by score, until exactly `kept` are chosen.
    `retention` for the budgets is kept / (frames * n) by default.
    """
    to_video, to_frame = likeness(x, frames)
    score = to_video + to_frame
    chosen = within_budget(score, budgets(to_video, kept / x.shape[1] if retention is None else retention))
    by_score = score.flatten(1).argsort(dim=-1, stable=True)
    first = (~chosen.flatten(1).gather(1, by_score)).byte().argsort(dim=-1, stable=True)  # within the budgets first
    return by_score.gather(1, first[:, :kept]).sort(dim=-1).values


def _steadiest(x: Tensor) -> Tensor:
    """(B, n, d) -> (B, d // 2): the channels of least variance over the tokens, ascending; ties go to the first."""
    parts = torch.split(x, fold.columns_at_once(x), dim=-1)
    variance = torch.cat([fold.at_least_fp32(some).var(dim=1, correction=0) for some in parts], dim=-1)
    return variance.argsort(dim=-1, stable=True)[:, : max(1, x.shape[-1] // 2)].sort(dim=-1).values


def _unit(x: Tensor, frames: int, channels: Tensor) -> Iterator[Tensor]:
    """Normalised tokens on these channels, some frames at a time: (B, some frames, n, d // 2)."""
    for some in torch.split(x.view(len(x), frames, -1, x.shape[-1]), _frames_at_once(x, frames), dim=1):
        index = channels[:, None, None].expand(*some.shape[:3], -1)
        yield F.normalize(fold.at_least_fp32(some.gather(-1, index)), dim=-1)


def _frames_at_once(x: Tensor, frames: int) -> int:
    return max(1, fold.AT_ONCE * frames // max(1, x.numel()))


def _gaussians(offset: Tensor) -> Tensor:
    """(..., d) -> (...)"""
    distance = offset.square().sum(dim=-1)
    return torch.stack([(-distance / (2 * width)).exp() for width in _WIDTHS]).sum(dim=0)


class VidCom2(AcrossFrames):
    """Keeps an exact number of tokens; in the authors' code the number depends on the video."""

    name = "vidcom2"
    summary = (
        "Of a video, keeps the vision tokens least like its mean and their frame's; frames unlike others keep more."
    )
    paper = "Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large Language Models"

    def min_kept(self, geometry: VisionGeometry) -> tuple[int, str]:
        return geometry.frames, "a token for each frame"

    def reduce(self, x: Tensor, plan: Plan, width: int | None = None) -> fold.Reduced:
        return fold.keep(x, vidcom2(x[..., :width], plan.frames, plan.kept))
