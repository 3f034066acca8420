"""Random choice of tokens: the control that every published method should beat."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foldserve.reducers.fold import Reduced, keep
from foldserve.reducers.method import AfterTower, Kind

if TYPE_CHECKING:
    from foldserve.reducers.plan import Plan


def draw_indices(n: int, kept: int, seed: int) -> Tensor:
    """(kept,) int64 of n indices, ascending, on the CPU; a seed gives the same draw on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(n, generator=generator)[:kept].sort().values


class Random(AfterTower):
    """Seeds the draw by the image, so that equal requests get equal answers."""

    name = "random"
    summary = "Keeps vision tokens drawn at random, the same ones for the same image; the control of every method."
    kind = Kind.DROP
    is_seeded = True

    def reduce(self, x: Tensor, plan: Plan, width: int | None = None) -> Reduced:
        return keep(x, draw_indices(plan.encoded, plan.kept, plan.seed))
