"""CDPruner: the most diverse tokens by a determinantal point process, without its condition on the text.

Greedy MAP inference: each time the token that makes the volume which the picked ones span largest. The authors weigh
tokens by how CLIP sees them fit the question, with CLIP's text tower, which no checkpoint of these models holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foldserve.reducers import cosines
from foldserve.reducers.cosines import Rows
from foldserve.reducers.fold import Reduced, true_fp32, unit_rows
from foldserve.reducers.method import ONLY_TOKENS, AfterProjector, Kind, Seen
from foldserve.reducers.options import Choice
from foldserve.reducers.random import keep
from foldserve.reducers.refusal import InvalidReduction

if TYPE_CHECKING:
    from foldserve.reducers.plan import Plan

NOTHING_LEFT = 1e-6
"""Share of the first pick's gain from which on the others add nothing but rounding."""


def cdpruner(x: Tensor, kept: int, *, metric: Tensor | None = None, relevance: Tensor | None = None) -> Reduced:
    """Keep tokens that span the largest volume, in position order.

    Args:
        x: (B, n, d), any float dtype.
        kept: of them stay, 1 <= kept <= n.
        metric: (B, n, d_m), what tokens are compared by; None: the tokens themselves.
        relevance: (B, n), what the kernel's rows and columns are multiplied by; None: 1.
    """
    metric = x if metric is None else metric
    images = cosines.together(x.shape[1])
    relevance = torch.ones(x.shape[:2], device=x.device) if relevance is None else relevance
    parts = zip(torch.split(metric, images), torch.split(relevance, images), strict=True)
    found = [largest_volume(unit_rows(some), kept, own) for some, own in parts]
    return keep(x, torch.cat(found).sort(dim=-1).values)


def largest_volume(unit: Tensor, kept: int, relevance: Tensor) -> Tensor:
    """Picks the token of the largest gain, one by one.

    Once nothing is left to gain, the most relevant of the others follow: `kept` may be more than the tokens' rank.

    Args:
        unit: (B, n, d) of norm 1 or 0, at least fp32.
        relevance: (B, n).

    Returns:
        (B, kept) int64 different tokens in the order of picking, of equals the first.
    """
    relevance = relevance.to(unit.dtype)
    gain = unit.square().sum(dim=2).round() * relevance.square()  # of a token that is not zero, exactly
    if cosines.holds_matrix(unit.shape[1]):
        return _greedy_map(cosines.rows_of(cosines.matrix(unit)), gain, relevance, kept)
    images = zip(torch.split(unit, 1), torch.split(gain, 1), torch.split(relevance, 1), strict=True)
    return torch.cat([_greedy_map(cosines.rows_made(own), of_own, fits, kept) for own, of_own, fits in images])


def _greedy_map(rows: Rows, gain: Tensor, relevance: Tensor, kept: int) -> Tensor:
    """See `largest_volume`. Nothing is read back: a pick stays where the next one is made.

    Args:
        rows: cosines of a token to all.
        gain: (B, n), of a pick before there are any.
        relevance: (B, n).
    """
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


class _Relevance(Choice):
    def parse(self, value: object) -> str:
        if value in ("text", "clip"):
            raise InvalidReduction(
                f"{self.name} {value!r} needs CLIP's text tower and its projections, which checkpoints of "
                "vision-language models do not hold: leave it out, or send 'none'",
                self.name,
            )
        return super().parse(value)


class CDPruner(AfterProjector):
    """By cosines of projected tokens, as the authors."""

    name = "cdpruner"
    summary = "Keeps vision tokens that span the largest volume (a DPP), whatever the question; works with any tower."
    paper = "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs"
    kind = Kind.DROP
    options = (_Relevance("relevance", "none", "tokens weigh alike: no text is looked at", ("none",)),)
    relevance: str

    def reduce(self, x: Tensor, plan: Plan, width: int | None = None, seen: Seen = ONLY_TOKENS) -> Reduced:
        return cdpruner(x, plan.kept, metric=x[..., :width])
