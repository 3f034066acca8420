"""iLLaVA: An Image is Worth Fewer Than 1/3 Input Tokens in Large Multimodal Models.

Merges the tokens that receive least attention into one, in some layers of the tower and again before decoder layer K.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from foldserve.reducers.fold import Reduced, at_least_fp32, by_columns, group_sizes, group_sum
from foldserve.reducers.geometry import VisionGeometry
from foldserve.reducers.method import InTower, Kind, ScoredInDecoder, Step
from foldserve.reducers.ops import Op
from foldserve.reducers.options import LayersOption
from foldserve.reducers.refusal import InvalidReduction
from foldserve.reducers.schedule import even_schedule

if TYPE_CHECKING:
    from foldserve.reducers.attention import LayerAttention
    from foldserve.reducers.plan import Plan


def illava(x: Tensor, score: Tensor, r: int) -> Reduced:
    """Merge the r + 1 tokens of lowest score into one, at the place of the highest of them; the order stays.

    As in the authors' code, the least attended token weighs most: normalised weights r + 1, r, ..., 1 by ascending
    score. In a tie the earlier token counts as lower.

    Args:
        x: (B, n, d), any float dtype.
        score: (B, n), attention that each token receives; infinite for a token that has to stay unchanged.
        r: 0 <= r < n.

    Raises:
        ValueError: r is out of range.
    """
    n = score.shape[1]
    if not 0 <= r < n:
        raise ValueError(f"{r} of {n} tokens cannot be merged into another: 0 to {n - 1} can")
    source, group, sizes, weight = lowest_into_one(score, r)
    tokens = by_columns(x, n - r, lambda some: group_sum(some, group, sizes, weight))
    return Reduced(tokens, sizes, source, group)


class IntoOne(NamedTuple):
    """Where tokens go when the r + 1 of lowest score become one; `source`, `group` and `sizes` as in `Reduced`.

    Attributes:
        weight: (B, n), at least fp32: weight of each token in its group's sum.
    """

    source: Tensor
    group: Tensor
    sizes: Tensor
    weight: Tensor


@Op
def lowest_into_one(score: Tensor, r: int) -> IntoOne:
    score = at_least_fp32(score)
    batch, n = score.shape
    lowest = score.argsort(dim=-1, stable=True)[:, : r + 1]  # (B, r + 1)
    weights = torch.arange(r + 1, 0, -1, device=score.device, dtype=score.dtype)
    weight = weights.new_ones(batch, n).scatter_(1, lowest, (weights / weights.sum()).expand(batch, -1))
    source = remaining_indices(lowest[:, :r], n)
    slot = torch.zeros_like(lowest[:, :1]).expand(batch, n).scatter(1, source, _count(n - r, lowest))
    merged_into = slot.gather(1, lowest[:, r:])  # (B, 1), slot of the highest of the merged tokens
    group = slot.scatter(1, lowest, merged_into.expand_as(lowest))
    return IntoOne(source, group, group_sizes(group, n - r), weight)


def image_score(last_row: Tensor, is_image: Tensor) -> Tensor:
    """Scores of a prompt's tokens in the decoder; infinite for text, which has to stay.

    Args:
        last_row: (B, n), attention from the last prompt token in layer K - 1, mean over heads.
        is_image: (B, n) bool.
    """
    return last_row.masked_fill(~is_image, torch.inf)


def remaining_indices(removed: Tensor, n: int) -> Tensor:
    """(B, r) distinct indices -> (B, n - r), the other indices, ascending."""
    gone = removed.new_zeros(removed.shape[0], n).scatter_(1, removed, 1)
    return gone.argsort(dim=-1, stable=True)[:, : n - removed.shape[1]]


def _count(m: int, like: Tensor) -> Tensor:
    """(B, m): 0 ... m - 1 in every row."""
    return torch.arange(m, device=like.device).expand(like.shape[0], m)


_PAPER = "iLLaVA: An Image is Worth Fewer Than 1/3 Input Tokens in Large Multimodal Models"


_PUBLISHED_LAYERS = (5, 6, 7, 8)


class Illava(InTower):
    """Removes tokens evenly over some layers and leaves the class token alone.

    The default layers are the authors' (for CLIP); with windowed attention, the first two that see the whole image.
    """

    name = "illava"
    summary = "Merges the vision tokens that are attended to least into one, in some layers of the tower."
    kind = Kind.MERGE
    paper = _PAPER
    options = (
        LayersOption(
            "layers",
            None,
            "tower layers in which tokens go, by default [5, 6, 7, 8]; of Qwen2.5-VL [7, 15], of videos of "
            "LLaVA-OneVision [3, 4, 5, 6]",
        ),
    )
    layers: tuple[int, ...] | None
    lays_out_squares = True
    decoder_half = "illava_decoder"

    def resolved_options(self, geometry: VisionGeometry, *, keeps_positions: bool) -> tuple[tuple[int, ...]]:
        return (self._layers_of(geometry),)

    def _layers_of(self, geometry: VisionGeometry) -> tuple[int, ...]:
        if self.layers is not None:
            return self.layers
        return geometry.reducing_layers[:2] if geometry.windowed_layers else _PUBLISHED_LAYERS

    def check(self, geometry: VisionGeometry) -> None:
        super().check(geometry)
        layers = self._layers_of(geometry)
        if layers[-1] >= geometry.layers:
            raise InvalidReduction(
                f"layers {layers} are not all in this model's vision tower: it runs 0 to {geometry.layers - 1}",
                "layers",
            )
        if windowed := [layer for layer in layers if layer in geometry.windowed_layers]:
            raise InvalidReduction(
                f"layers {windowed} of this model's vision tower attend within windows, where not all tokens can be "
                f"compared: choose from {list(geometry.reducing_layers)}",
                "layers",
            )

    def schedule(self, geometry: VisionGeometry, removed: int) -> tuple[Step, ...]:
        layers = self._layers_of(geometry)
        each = zip(even_schedule(removed, len(layers)), layers, strict=True)
        return tuple(Step(r, layer) for r, layer in each if r)

    def reduce(
        self, x: Tensor, sizes: Tensor, attention: LayerAttention, removed: tuple[int, ...], plan: Plan
    ) -> Reduced:
        score = attention.attention_received()
        if attention.class_token:
            score[:, 0] = torch.inf
        reduced = illava(x, score, sum(removed))
        return reduced._replace(sizes=group_sizes(reduced.group, reduced.tokens.shape[1], sizes))


class IllavaDecoder(ScoredInDecoder):
    name = "illava_decoder"
    summary = "Merges the vision tokens that the last prompt token attends to least, before decoder layer K."
    paper = _PAPER
    default_ratio = 0.3
    merges = True

    def removed(self, tokens: int, ratio: float | None) -> int:
        return round(tokens * ratio) if ratio else 0  # halves to even, as the authors round

    def reduce(self, x: Tensor, score: Tensor, removed: int) -> Reduced:
        return illava(x, score, removed)
