"""Token Merging: Your ViT But Faster (ToMe), and Turbo: ToMe with the class token's attention in the score."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from foldserve.reducers.fold import Order, Reduced, at_least_fp32, fold, merge
from foldserve.reducers.geometry import VisionGeometry
from foldserve.reducers.method import InTower, Kind, Step
from foldserve.reducers.refusal import InvalidReduction
from foldserve.reducers.schedule import even_schedule

if TYPE_CHECKING:
    from foldserve.reducers.attention import LayerAttention
    from foldserve.reducers.plan import Plan


def tome(
    x: Tensor, keys: Tensor, sizes: Tensor, r: int, *, class_token: bool, penalty: Tensor | None = None
) -> Reduced:
    """Merge the r even tokens with the most similar keys into their odd partners, between attention and MLP.

    Unmerged even tokens come first, then all odd ones. Without a class token the even ones are sorted by score, best
    first: the authors' code sorts them by position only to keep the class token first.

    Args:
        x: (B, n, d), any float dtype.
        keys: (B, n, d_k), mean over heads of the layer's key projections.
        sizes: (B, n) int64, original tokens in each token.
        r, class_token, penalty: see `fold`.
    """
    order: Order = "unmerged_first" if class_token else "best_unmerged_first"
    step = fold(keys, r, order=order, class_token=class_token, penalty=penalty)
    return merge(x, [step], sizes)


def turbo(x: Tensor, keys: Tensor, cls_attention: Tensor, sizes: Tensor, r: int, *, alpha: float = 10.0) -> Reduced:
    """`tome` with 30 * alpha * `cls_attention` subtracted from the scores; the factor 30 is from the authors' code.

    `cls_attention` is (B, n), softmaxed, mean over heads.
    """
    return tome(x, keys, sizes, r, class_token=True, penalty=30 * alpha * at_least_fp32(cls_attention))


class ToMe(InTower):
    """Removes tokens evenly over all layers that see the whole image, with proportional attention after each."""

    name = "tome"
    summary = "Merges vision tokens with similar keys, some in every layer of the tower."
    kind = Kind.MERGE
    paper = "Token Merging: Your ViT But Faster"
    proportional_attention = True

    def removable(self, geometry: VisionGeometry, removed: int) -> int:
        if not _fits(geometry, removed):
            most = next(r for r in range(removed, -1, -1) if _fits(geometry, r))
            raise InvalidReduction(
                f"method {self.name!r} can't remove {removed} of {geometry.tokens} tokens: at most half of them can go "
                f"in a layer, {most} in the {len(geometry.reducing_layers)} layers together: give a ratio of at most "
                f"{most / geometry.tokens:.4f}, or {geometry.tokens - most} keep_tokens",
                "ratio",
            )
        return removed

    def schedule(self, geometry: VisionGeometry, removed: int) -> tuple[Step, ...]:
        layers = geometry.reducing_layers
        each = zip(even_schedule(removed, len(layers)), layers, strict=True)
        return tuple(Step(r, layer) for r, layer in each if r)

    def reduce(
        self, x: Tensor, sizes: Tensor, attention: LayerAttention, removed: tuple[int, ...], plan: Plan
    ) -> Reduced:
        return tome(x, attention.keys(), sizes, sum(removed), class_token=attention.class_token)


class Turbo(ToMe):
    name = "turbo"
    summary = "Merges vision tokens with similar keys that CLIP's class token hardly attends to, in every layer."
    paper = "Turbo: Informativity-Driven Acceleration Plug-In for Vision-Language Large Models"
    needs_class_token = True

    def reduce(
        self, x: Tensor, sizes: Tensor, attention: LayerAttention, removed: tuple[int, ...], plan: Plan
    ) -> Reduced:
        return turbo(x, attention.keys(), attention.class_attention(), sizes, sum(removed))


def _fits(geometry: VisionGeometry, removed: int) -> bool:
    """Whether no layer would have to merge more than half of the patches left."""
    left = geometry.tokens
    for r in even_schedule(removed, len(geometry.reducing_layers)):
        if r > left // 2:
            return False
        left -= r
    return True
