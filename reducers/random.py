"""Random choice of tokens: the control that every published method should beat."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foldserve.reducers.fold import Reduced
from foldserve.reducers.method import AfterTower, Kind

if TYPE_CHECKING:
    from foldserve.reducers.plan import Plan


def draw_indices(n: int, kept: int, seed: int) -> Tensor:
    """(kept,) int64 of n indices, ascending, on the CPU; a seed gives the same draw on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(n, generator=generator)[:kept].sort().values


def keep(x: Tensor, kept: Tensor) -> Reduced:
    """Keep the tokens at the distinct ascending indices `kept`, (m,) or (B, m), and drop the others."""
    source = _sent(kept, x.device).expand(x.shape[0], -1)
    slots = torch.arange(kept.shape[-1], device=x.device).expand_as(source)
    group = source.new_full(x.shape[:2], -1).scatter_(1, source, slots)
    tokens = x.gather(1, source.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    return Reduced(tokens, torch.ones_like(source), source, group)


def _sent(x: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting for it, which needs pinned memory on a GPU."""
    if x.device == device:
        return x
    return (x.pin_memory() if torch.cuda.is_available() else x).to(device, non_blocking=True)


class Random(AfterTower):
    """Seeds the draw by the image, so that equal requests get equal answers."""

    name = "random"
    summary = "Keeps vision tokens drawn at random, the same ones for the same image; the control of every method."
    kind = Kind.DROP
    is_seeded = True

    def reduce(self, x: Tensor, plan: Plan, width: int | None = None) -> Reduced:
        return keep(x, draw_indices(plan.encoded, plan.kept, plan.seed))
