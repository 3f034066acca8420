"""VisionZip: Longer is Better but Not Necessary in Vision Language Models.

Keeps the patches that receive most attention and merges the others into a few.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from foldserve.reducers.fold import Reduced, by_columns, group_sizes, group_sum, true_fp32, unit_rows
from foldserve.reducers.geometry import VisionGeometry
from foldserve.reducers.illava import remaining_indices
from foldserve.reducers.method import AfterLastLayer, Kind
from foldserve.reducers.options import FlagOption
from foldserve.reducers.prumerge import most_attended
from foldserve.reducers.refusal import InvalidReduction

if TYPE_CHECKING:
    from foldserve.reducers.attention import LayerAttention
    from foldserve.reducers.plan import Plan


def contextual_tokens(kept: int) -> int:
    """How many of the kept tokens are merged ones: the authors' 10 of 64, 20 of 128 and 30 of 192."""
    return kept * 5 // 32


def visionzip(x: Tensor, score: Tensor, keys: Tensor, dominant: int, contextual: int) -> Reduced:
    """Keep the `dominant` tokens of highest score and merge the others into `contextual` ones; drop them if that is 0.

    As in the authors' code, targets are every `others // contextual`-th of the others, so the last target may be far
    from the end. Each other token goes to the target with the most similar key, and a target becomes itself plus the
    mean of those: not the mean of its group.

    Args:
        x: (B, n, d), any float dtype, in position order.
        score: (B, n), attention that each token receives; infinite for a token that has to stay unchanged.
        keys: (B, n, d_k), mean over heads of the layer's key projections.

    Returns:
        The dominant tokens by position, then the contextual ones by position of their target (`source`).

    Raises:
        ValueError: there are fewer others than contextual tokens.
    """
    others = x.shape[1] - dominant
    if not 0 <= contextual <= others:
        raise ValueError(f"{others} tokens cannot be merged into {contextual}")
    selected = most_attended(score, dominant).sort(dim=1).values
    rest = remaining_indices(selected, x.shape[1])  # (B, others)
    targets = rest[:, :: max(1, others // max(1, contextual))][:, :contextual]
    source = torch.cat([selected, targets], dim=1)
    slots = torch.arange(dominant + contextual, device=x.device).expand_as(source)
    if not contextual:
        group = torch.full_like(score, -1, dtype=torch.int64).scatter(1, source, slots)
        return Reduced(_rows(x, source), torch.ones_like(source), source, group)

    unit = unit_rows(keys)
    with true_fp32():
        nearest = (_rows(unit, rest) @ _rows(unit, targets).mT).max(dim=-1).indices  # (B, others)
    group = torch.zeros_like(score, dtype=torch.int64).scatter(1, rest, dominant + nearest).scatter(1, source, slots)
    sizes = group_sizes(group, dominant + contextual)
    share = 1 / (sizes - 1).clamp_min(1).to(unit.dtype)  # weight of each token that goes to a target
    weight = share.gather(1, group).scatter(1, source, 1.0)
    tokens = by_columns(x, dominant + contextual, lambda some: group_sum(some, group, sizes, weight))
    return Reduced(tokens, sizes, source, group)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """(B, n, d), (B, m) -> (B, m, d)"""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class VisionZip(AfterLastLayer):
    """Scores patches by the class token's attention, or by all attention received in a tower without class token.

    As in the authors' code, the class token is one of the kept tokens. It has no position in the image, so one more
    patch stays instead if tokens keep their positions. In that case, and on Qwen-VL, merged tokens too are in position
    order.
    """

    name = "visionzip"
    summary = "Keeps the vision tokens that the tower's last layer attends to most, and merges the others into a few."
    kind = Kind.MERGE
    paper = "VisionZip: Longer is Better but Not Necessary in Vision Language Models"
    options = (
        FlagOption(
            "class_token",
            None,
            "one of the tokens that stay is the tower's class token: by default where there is one and `positions` are "
            "'renumber'",
        ),
    )
    class_token: bool | None

    def resolved_options(self, geometry: VisionGeometry, *, keeps_positions: bool) -> tuple[bool]:
        if self.class_token and keeps_positions:
            raise InvalidReduction(
                "class_token needs positions 'renumber', for the class token has no position in the image: send "
                "that, or leave class_token out",
                "class_token",
            )
        by_default = geometry.class_token and not keeps_positions
        return (by_default if self.class_token is None else self.class_token,)

    def check(self, geometry: VisionGeometry) -> None:
        super().check(geometry)
        if self.class_token and not geometry.class_token:
            raise InvalidReduction(
                "class_token needs a class token, but this model's vision tower has none: leave it out", "class_token"
            )

    def reduce(
        self, x: Tensor, sizes: Tensor, attention: LayerAttention, removed: tuple[int, ...], plan: Plan
    ) -> Reduced:
        score = attention.class_attention() if attention.class_token else attention.attention_received()
        if self.class_token:
            score[:, 0] = torch.inf
        first = int(attention.class_token and not self.class_token)
        contextual, keys = contextual_tokens(plan.kept), attention.key_projections()[:, first:]
        reduced = visionzip(x[:, first:], score[:, first:], keys, plan.kept - contextual, contextual)
        return reduced._replace(source=reduced.source + first, group=F.pad(reduced.group, (first, 0), value=-1))
