"""DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models.

Greedy max-min selection: each pick is the token whose nearest pick is farthest. The centered geometry, from "Centering
before Pruning" (arXiv 2608.30263), subtracts the image's mean token and weighs tokens by how distinct they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from foldserve.reducers import cosines
from foldserve.reducers.cosines import Rows
from foldserve.reducers.fold import Reduced, at_least_fp32, keep, merge_groups, unit_rows
from foldserve.reducers.geometry import VisionGeometry
from foldserve.reducers.method import NO_SIDE_INPUTS, AfterProjector, Kind, SideInputs
from foldserve.reducers.ops import Op
from foldserve.reducers.options import ChoiceOption, Value

if TYPE_CHECKING:
    from foldserve.reducers.plan import Plan

Geometry = Literal["plain", "centered", "standardized"]
Rest = Literal["drop", "merge"]

_EPS = 1e-6  # the paper of the centered geometry gives no value


def divprune(
    x: Tensor,
    kept: int,
    *,
    metric: Tensor | None = None,
    geometry: Geometry = "plain",
    rest: Rest = "drop",
) -> Reduced:
    """Keep tokens that are far from each other, in position order.

    Args:
        x: (B, n, d), any float dtype.
        kept: 1 <= kept <= n.
        metric: (B, n, d_m), vectors to compare instead of the tokens.
        geometry: "plain" compares tokens by cosine; "centered" subtracts their mean first and weighs distances;
            "standardized" also divides channels by their deviation, as the paper does for Qwen2.5-VL.
        rest: "merge" averages each of the other tokens into its nearest pick.
    """
    metric = x if metric is None else metric
    found = [_choose(some, kept, geometry, rest) for some in torch.split(metric, cosines.images_at_once(x.shape[1]))]
    source = torch.cat([own for own, _ in found])
    if rest == "drop":
        return keep(x, source)
    group = torch.cat([own for _, own in found])
    return merge_groups(x, group, source)


def _choose(metric: Tensor, kept: int, geometry: Geometry, rest: Rest) -> tuple[Tensor, Tensor]:
    """(B, kept) int64 indices of the picks, ascending, and (B, n) int64: the pick that each token merges into."""
    unit, weight = (unit_rows(metric), None) if geometry == "plain" else _centered(metric, geometry)
    source = farthest(unit, kept, weight).sort(dim=-1).values
    return source, _nearest(unit, source) if rest == "merge" else source


def _centered(metric: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """(B, n, d) -> normalised centered tokens (B, n, d) and their weights (B, n)."""
    y = at_least_fp32(metric)
    if geometry == "standardized":
        y = y / (y.var(dim=1, correction=0, keepdim=True) + _EPS).sqrt()
    distinct = _distinct(unit_rows(y))
    if geometry == "standardized":
        deviation = distinct.std(dim=1, correction=0, keepdim=True)
        weight = ((distinct - distinct.mean(dim=1, keepdim=True)) / (deviation + _EPS)).sigmoid()
    else:
        low, high = distinct.aminmax(dim=1, keepdim=True)
        weight = (distinct - low) / (high - low + _EPS)
    return unit_rows(y - y.mean(dim=1, keepdim=True)), weight


def _distinct(unit: Tensor) -> Tensor:
    """(B, n, d) -> (B, n): minus the mean cosine of each token to all others."""
    to_all = (unit * unit.sum(dim=1, keepdim=True)).sum(dim=-1)
    to_itself: Tensor = unit.norm(dim=-1).square()
    return (to_itself - to_all) / max(1, unit.shape[1] - 1)


def farthest(unit: Tensor, kept: int, weight: Tensor | None = None) -> Tensor:
    """Pick the token whose nearest other token is farthest, then always the one whose nearest pick is farthest.

    Args:
        unit: (B, n, d) of norm 1 or 0, at least fp32; the distance is 1 - cosine.
        weight: (B, n), multiplies distances after the first pick; None: 1.

    Returns:
        (B, kept) int64 distinct indices in the order of picking; ties go to the first. A smaller `kept` gives a prefix.
    """
    if not cosines.holds_matrix(unit.shape[1]):
        weights = [None] * len(unit) if weight is None else torch.split(weight, 1)
        images = zip(torch.split(unit, 1), weights, strict=True)
        firsts = (_isolated(cosines.by_parts(own, own)) for own in torch.split(unit, 1))
        return torch.cat([_chain(cosines.rows_made(own), next(firsts), kept, of_own) for own, of_own in images])
    matrix = cosines.matrix(unit)
    return farthest_first(matrix, _isolated([matrix]), kept, weight)


@Op
def farthest_first(matrix: Tensor, first: Tensor, kept: int, weight: Tensor | None = None) -> Tensor:
    """`farthest` from a given first pick.

    Args:
        matrix: (B, n, n) cosines; the diagonal is ignored.
        first: (B, 1) int64.
        weight: (B, n).

    Returns:
        (B, kept) int64 indices in the order of picking, `first` included.
    """
    return _chain(cosines.rows_of(matrix), first, kept, weight)


def _chain(rows: Rows, first: Tensor, kept: int, weight: Tensor | None) -> Tensor:
    """`farthest_first`. Picks stay on the device: the host never waits."""
    picks, distance = [first], 1 - rows(first)
    for _ in range(1, kept):
        distance.scatter_(1, picks[-1], -torch.inf)
        score = distance if weight is None else (distance * weight).masked_fill_(distance == -torch.inf, -torch.inf)
        picks.append(score.argmax(dim=1, keepdim=True))
        distance = torch.fmin(distance, 1 - rows(picks[-1]))  # fmin: NaN must not replace the -inf of picks
    return torch.cat(picks, dim=1)


def _isolated(parts: Iterable[Tensor]) -> Tensor:
    """(B, 1): the token whose nearest other token is farthest.

    Two tokens that are each other's nearest tie. Their two entries of the matrix may round differently, so the larger
    one counts for both.

    Args:
        parts: successive rows of the cosine matrix, (B, some, n); their diagonal is overwritten with -inf.
    """
    of_rows: list[Tensor] = []
    of_columns: list[Tensor] = []
    start = 0
    for part in parts:
        part.diagonal(offset=start, dim1=1, dim2=2).fill_(-torch.inf)
        of_rows.append(part.amax(dim=2))
        of_columns.append(part.amax(dim=1))
        start += part.shape[1]
    nearest = torch.maximum(torch.cat(of_rows, dim=1), torch.stack(of_columns).amax(dim=0))
    return (1 - nearest).argmax(dim=1, keepdim=True)


def _nearest(unit: Tensor, source: Tensor) -> Tensor:
    """(B, n) int64: index into `source` (B, kept) of the pick nearest to each token; a pick is nearest to itself."""
    picked = unit.gather(1, source.unsqueeze(2).expand(-1, -1, unit.shape[2]))
    group = torch.cat([part.argmax(dim=2) for part in cosines.by_parts(unit, picked)], dim=1)
    slots = torch.arange(source.shape[1], device=source.device).expand_as(source)
    return group.scatter(1, source, slots)


class DivPrune(AfterProjector):
    """Compares projected tokens, which the authors of both papers found better than the tower's."""

    name = "divprune"
    summary = "Keeps vision tokens that are as unlike each other as can be; works with any tower."
    paper = "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models"
    kind = Kind.DROP
    options = (
        ChoiceOption(
            "geometry",
            "plain",
            "'centered' measures from the image's mean token (arXiv 2608.30263), on Qwen-VL by 'standardized' channels",
            ("plain", "centered", "standardized"),
        ),
        ChoiceOption(
            "rest", "drop", "'merge' averages the other tokens into the nearest that stays", ("drop", "merge")
        ),
    )
    geometry: Geometry
    rest: Rest

    def resolved_options(self, geometry: VisionGeometry, *, keeps_positions: bool) -> tuple[Value, ...]:
        """Turns "centered" into "standardized" where the paper does, on Qwen-VL."""
        is_standardized = self.geometry == "centered" and geometry.merges_patches
        return ("standardized" if is_standardized else self.geometry, self.rest)

    def reduce(self, x: Tensor, plan: Plan, width: int | None = None, side: SideInputs = NO_SIDE_INPUTS) -> Reduced:
        return divprune(x, plan.kept, metric=x[..., :width], geometry=self.geometry, rest=self.rest)
