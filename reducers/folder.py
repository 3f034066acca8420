"""FOLDER: Accelerating Multi-modal Large Language Models with Enhanced Performance, in two forms.

`folder` compares the tower's output tokens and works with any tower. `folder_cls`, the form in the paper's tables,
works inside a CLIP layer: it compares attention keys and spares tokens that the class token attends to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from foldserve.reducers.fold import Fold, Reduced, at_least_fp32, fold, group_sum, merge
from foldserve.reducers.geometry import VisionGeometry
from foldserve.reducers.method import AfterTower, InTower, Kind, Step
from foldserve.reducers.options import ChoiceOption, FlagOption
from foldserve.reducers.refusal import InvalidReduction
from foldserve.reducers.schedule import fold_schedule

if TYPE_CHECKING:
    from foldserve.reducers.attention import LayerAttention
    from foldserve.reducers.plan import Plan

Scale = Literal["none", "official"]


def folder(
    x: Tensor,
    folds: Sequence[int],
    *,
    metric: Tensor | None = None,
    scale: Scale = "none",
    class_token: bool = False,
) -> Reduced:
    """Merge similar tokens into the mean of their group; the tokens that stay keep their order.

    Args:
        x: (B, n, d), any float dtype.
        folds: tokens that each fold removes (`Plan.folds`).
        metric: (B, n, d_m), vectors to compare instead of the tokens.
        scale: "official" multiplies tokens by 1 + ln(size) where the authors' code does, not in the paper: after
            several folds, or after one that removes less than half as many tokens as stay.
        class_token: token 0 is the class token; it stays first, unchanged.
    """
    metric = x if metric is None else metric
    steps: list[Fold] = []
    for k in folds:
        if steps:
            metric = group_sum(metric, steps[-1].slot, steps[-1].sizes)  # sum and mean have the same cosines
        steps.append(fold(metric, k, order="position", class_token=class_token))
    is_scaled = scale == "official" and (len(folds) > 1 or sum(folds) < (x.shape[1] - sum(folds)) // 2)
    return merge(x, steps, scale=_official_scale if is_scaled else None)


def _official_scale(sizes: Tensor) -> Tensor:
    return 1 + sizes.log()


def folder_cls(
    x: Tensor,
    keys: Tensor,
    cls_attention: Tensor,
    folds: Sequence[int],
    *,
    attention_weight: float = 500.0,
) -> Reduced:
    """Merge tokens with similar keys into the mean of their group, those with little class attention first.

    Runs after the attention residual of the last CLIP layer that is used (index num_layers - 2 for LLaVA), before its
    MLP. Unmerged even tokens come before all odd ones, and the next fold pairs tokens in that order.

    Args:
        x: (B, n + 1, d), any float dtype, the class token first; it stays first, unchanged.
        keys: (B, n + 1, d_k), the layer's key projections with bias, mean over heads.
        cls_attention: (B, n + 1), softmaxed attention from the class token to all tokens, mean over heads.
        folds: tokens that each fold removes (`Plan.folds`).
        attention_weight: weight of the attention relative to the cosine, 100 times the paper's alpha.
    """
    # (B, n + 1, d_k + 1): keys and attention of each group for the next fold
    carried = torch.cat([at_least_fp32(keys), at_least_fp32(cls_attention).unsqueeze(-1)], dim=-1)
    steps: list[Fold] = []
    for k in folds:
        if steps:
            carried = group_sum(carried, steps[-1].slot, steps[-1].sizes)
            carried[..., -1] /= steps[-1].sizes  # plain mean over the group of one fold, not weighted by size
        penalty = attention_weight * carried[..., -1]
        steps.append(fold(carried[..., :-1], k, order="unmerged_first", class_token=True, penalty=penalty))
    return merge(x, steps)


_PAPER = "FOLDER: Accelerating Multi-modal Large Language Models with Enhanced Performance"


class Folder(AfterTower):
    name = "folder"
    summary = "Merges vision tokens that look alike, after the vision tower; works with any tower."
    kind = Kind.MERGE
    paper = _PAPER
    options = (
        ChoiceOption("scale", "none", "'official' multiplies by 1 + ln(size) as the authors do", ("none", "official")),
        FlagOption(
            "match_class_token",
            False,
            "the class token in front of each of Video-LLaVA's frames counts as a token of the frame that can't merge, "
            "which moves all pairs by one place, as in the authors' code",
        ),
    )
    scale: Literal["none", "official"]
    match_class_token: bool

    @property
    def takes_class_token(self) -> bool:
        return self.match_class_token

    def check(self, geometry: VisionGeometry) -> None:
        super().check(geometry)
        if self.match_class_token and not geometry.behind_class_token:
            raise InvalidReduction(
                "match_class_token needs tokens behind a class token that stays, as the frames of Video-LLaVA's videos "
                "have: leave it out",
                "match_class_token",
            )

    def schedule(self, geometry: VisionGeometry, removed: int) -> tuple[Step, ...]:
        return tuple(Step(k) for k in fold_schedule(geometry.tokens + self.match_class_token, removed))

    def reduce(self, x: Tensor, plan: Plan, width: int | None = None) -> Reduced:
        return folder(x, plan.folds, metric=x[..., :width], scale=self.scale, class_token=self.match_class_token)


class FolderCls(InTower):
    name = "folder_cls"
    summary = "Merges vision tokens inside the CLIP tower, those first that the class token attends to least."
    kind = Kind.MERGE
    paper = _PAPER
    needs_class_token = True

    def schedule(self, geometry: VisionGeometry, removed: int) -> tuple[Step, ...]:
        # + 1: the fold counts the class token
        return tuple(Step(k, geometry.layers - 1) for k in fold_schedule(geometry.tokens + 1, removed))

    def reduce(
        self, x: Tensor, sizes: Tensor, attention: LayerAttention, removed: tuple[int, ...], plan: Plan
    ) -> Reduced:
        return folder_cls(x, attention.keys(), attention.class_attention(), removed)
