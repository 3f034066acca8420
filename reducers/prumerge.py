"""LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models.

The count is fixed: the authors' adaptive count depends on the image, so the prompt would have to wait for the tower.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from foldserve.reducers.fold import Reduced, at_least_fp32, group_sizes
from foldserve.reducers.geometry import VisionGeometry
from foldserve.reducers.method import InTower, Kind, Step

if TYPE_CHECKING:
    from foldserve.reducers.attention import LayerAttention
    from foldserve.reducers.plan import Plan

_NEIGHBOURS = 32


def most_attended(attention: Tensor, count: int) -> Tensor:
    """(B, n) -> (B, count): indices by descending attention; ties go to the earlier token."""
    return attention.argsort(dim=-1, descending=True, stable=True)[:, :count]


def prumerge(x: Tensor, attention: Tensor, selected: Tensor, cosine: Tensor) -> Reduced:
    """Add to each selected token its neighbours, and sum all unselected tokens into one more.

    As in the authors' code, a selected token becomes itself plus the attention-weighted sum of up to 32 tokens with the
    most similar keys, selected ones included. This is not a mean, and a token may contribute to several sums.

    Args:
        x: (B, n, d), any float dtype, patches without the class token.
        attention: (B, n), from the class token to the patches, heads concatenated.
        selected: (B, m), 1 <= m < n distinct patches, in output order.
        cosine: (B, m, n), between the keys of selected and all patches.

    Returns:
        m + 1 tokens. The last one's `group` is all unselected tokens; its `source` is the most attended of them.
    """
    n, m = x.shape[1], selected.shape[1]
    cosine = cosine.scatter(2, selected.unsqueeze(-1), -torch.inf)  # a token is not its own neighbour
    nearest = cosine.argsort(dim=-1, descending=True, stable=True)[..., : min(_NEIGHBOURS, n - 1)]
    bags = torch.cat([selected.unsqueeze(-1), nearest], dim=-1)  # (B, m, 33)
    weights = attention.unsqueeze(1).expand(-1, m, -1).gather(2, bags)
    weights[..., 0] = 1
    rest = attention.scatter(1, selected, 0.0)  # (B, n)
    tokens = torch.cat([weighted_sums(x, bags, weights), weighted_sums(x, _all_indices(x), rest.unsqueeze(1))], dim=1)

    slots = torch.arange(m, device=x.device).expand_as(selected)
    group = torch.full_like(rest, m, dtype=torch.int64).scatter(1, selected, slots)
    left = attention.scatter(1, selected, -torch.inf).argmax(dim=1, keepdim=True)
    return Reduced(tokens.to(x.dtype), group_sizes(group, m + 1), torch.cat([selected, left], dim=1), group)


def weighted_sums(x: Tensor, members: Tensor, weights: Tensor) -> Tensor:
    """(B, m, d): sum of weights[b, i, j] * x[b, members[b, i, j]] over j, in order and in at least fp32.

    `members` and `weights` are (B, m, k); (B, m, k, d) is never held.
    """
    batch, n, width = x.shape
    values = at_least_fp32(x).reshape(-1, width)
    first_row = torch.arange(0, batch * n, n, device=x.device)[:, None, None]
    rows, weights = (members + first_row).flatten(0, 1), weights.to(values.dtype).flatten(0, 1)
    return F.embedding_bag(rows, values, mode="sum", per_sample_weights=weights).view(*members.shape[:2], width)


def _all_indices(x: Tensor) -> Tensor:
    """(B, 1, n) indices."""
    return torch.arange(x.shape[1], device=x.device).expand(x.shape[0], 1, -1)


class PruMerge(InTower):
    """Works in the last layer that runs, between attention and MLP, with that layer's queries and keys.

    The authors merge the input of the next layer by its queries and keys, but LLaVA does not run that layer.
    """

    name = "prumerge"
    summary = "Keeps the vision tokens that CLIP's class token attends to most, and adds their neighbours to them."
    kind = Kind.MERGE
    paper = "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models"
    needs_class_token = True

    def schedule(self, geometry: VisionGeometry, removed: int) -> tuple[Step, ...]:
        return (Step(removed, geometry.layers - 1),)

    def reduce(
        self, x: Tensor, sizes: Tensor, attention: LayerAttention, removed: tuple[int, ...], plan: Plan
    ) -> Reduced:
        patches = x[:, 1:]
        received = attention.class_attention_as_one_head()[:, 1:]
        selected = most_attended(received, plan.kept - 1)
        merged = prumerge(patches, received, selected, attention.key_cosine(1 + selected)[..., 1:])
        tokens = torch.cat([x[:, :1], merged.tokens], dim=1)
        group = F.pad(1 + merged.group, (1, 0))  # the class token is group 0
        source = F.pad(1 + merged.source, (1, 0))
        return Reduced(tokens, group_sizes(group, tokens.shape[1], sizes), source, group)
