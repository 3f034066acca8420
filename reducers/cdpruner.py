"""CDPruner: the most diverse tokens by a determinantal point process (DPP), without the paper's text condition.

Greedy MAP inference: each pick maximises the volume spanned by all picks. The authors also weigh tokens by CLIP's
similarity to the question, which needs CLIP's text tower; checkpoints of vision-language models do not contain it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foldserve.reducers import cosines
from foldserve.reducers.cosines import Rows
from foldserve.reducers.fold import Reduced, keep, true_fp32, unit_rows
from foldserve.reducers.method import NO_SIDE_INPUTS, AfterProjector, Kind, SideInputs
from foldserve.reducers.options import ChoiceOption
from foldserve.reducers.refusal import InvalidReduction

if TYPE_CHECKING:
    from foldserve.reducers.plan import Plan

NOTHING_LEFT = 1e-6
"""Gains below this share of the first pick's gain are rounding errors."""


def cdpruner(x: Tensor, kept: int, *, metric: Tensor | None = None, relevance: Tensor | None = None) -> Reduced:
    """Keep the tokens that span the largest volume, in position order.

    Args:
        x: (B, n, d), any float dtype.
        kept: 1 <= kept <= n.
        metric: (B, n, d_m), vectors to compare instead of the tokens.
        relevance: (B, n), scales the rows and columns of the DPP's kernel; None: 1.
    """
    metric = x if metric is None else metric
    images = cosines.images_at_once(x.shape[1])
    relevance = torch.ones(x.shape[:2], device=x.device) if relevance is None else relevance
    parts = zip(torch.split(metric, images), torch.split(relevance, images), strict=True)
    found = [largest_volume(unit_rows(some), kept, own) for some, own in parts]
    return keep(x, torch.cat(found).sort(dim=-1).values)


def largest_volume(unit: Tensor, kept: int, relevance: Tensor) -> Tensor:
    """Pick the token of largest gain, one by one; ties go to the first.

    Once no gain is left, because `kept` exceeds the rank, the most relevant of the other tokens follow.

    Args:
        unit: (B, n, d) of norm 1 or 0, at least fp32.
        relevance: (B, n).

    Returns:
        (B, kept) int64 distinct indices in the order of picking.
    """
    relevance = relevance.to(unit.dtype)
    gain = unit.square().sum(dim=2).round() * relevance.square()  # rounded: squared norms are exactly 1 or 0
    if cosines.holds_matrix(unit.shape[1]):
        return _greedy_map(cosines.rows_of(cosines.matrix(unit)), gain, relevance, kept)
    images = zip(torch.split(unit, 1), torch.split(gain, 1), torch.split(relevance, 1), strict=True)
    return torch.cat([_greedy_map(cosines.rows_made(own), of_own, fits, kept) for own, of_own, fits in images])


def _greedy_map(rows: Rows, gain: Tensor, relevance: Tensor, kept: int) -> Tensor:
    """`largest_volume` from the (B, n) gains of the first pick. Picks stay on the device: the host never waits."""
    batch, n = gain.shape
    picks: list[Tensor] = []
    factor = gain.new_empty(batch, kept, n)  # rows of the Cholesky factor
    least = gain.amax(dim=1, keepdim=True) * NOTHING_LEFT
    left = relevance.clone()
    for k in range(kept):
        best, pick = gain.max(dim=1, keepdim=True)
        is_over = best <= least
        pick = torch.where(is_over, left.argmax(dim=1, keepdim=True), pick)
        picks.append(pick)
        own, others = relevance.gather(1, pick), factor[:, :k]
        with true_fp32():
            explained = torch.bmm(others.gather(2, pick.unsqueeze(2).expand(-1, k, 1)).mT, others).squeeze(1)
        row = (own * rows(pick) * relevance - explained) / best.sqrt()
        row = row.masked_fill(is_over, 0)
        factor[:, k] = row
        left.scatter_(1, pick, -torch.inf)
        gain = (gain - row.square()).masked_fill_(left == -torch.inf, -torch.inf)
    return torch.cat(picks, dim=1)


class _Relevance(ChoiceOption):
    def parse(self, value: object) -> str:
        if value in ("text", "clip"):
            raise InvalidReduction(
                f"{self.name} {value!r} needs CLIP's text tower and its projections, which checkpoints of "
                "vision-language models do not hold: leave it out, or send 'none'",
                self.name,
            )
        return super().parse(value)


class CDPruner(AfterProjector):
    """Compares projected tokens by cosine, as the authors do."""

    name = "cdpruner"
    summary = "Keeps vision tokens that span the largest volume (a DPP), whatever the question; works with any tower."
    paper = "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs"
    kind = Kind.DROP
    options = (_Relevance("relevance", "none", "tokens weigh alike: no text is looked at", ("none",)),)
    relevance: str

    def reduce(self, x: Tensor, plan: Plan, width: int | None = None, side: SideInputs = NO_SIDE_INPUTS) -> Reduced:
        return cdpruner(x, plan.kept, metric=x[..., :width])
