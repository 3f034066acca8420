"""Losses, and the classification heads that exist only during training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foldserve.server.quality.demo.questions import ALL_KINDS, REFERENTS, UNKNOWN
from foldserve.server.quality.demo.scene import LABELS
from tools.demo_model.batch import Batch

_BACKGROUND_WEIGHT = 0.3  # of class 0 in the patch loss: most patches show background
_WHEREABOUTS = ("row", "column")  # labels without a background class


class ClassHeads(nn.Module):
    """One linear classifier for each of `classes` (name -> number of classes), on the same vectors."""

    def __init__(self, width: int, classes: Mapping[str, int]) -> None:
        super().__init__()
        self.classes = dict(classes)
        self.linear = nn.Linear(width, sum(classes.values()))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Logits (..., classes) of each."""
        return torch.split(self.linear(x).float(), list(self.classes.values()), -1)


def patch_loss(heads: ClassHeads, features: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of each patch's labels, summed over kinds of label, and accuracy on patches without background."""
    total, right = features.new_zeros(()), {}
    for index, (name, logits) in enumerate(zip(LABELS, heads(features), strict=True)):
        wanted, weight = labels[..., index], torch.ones(LABELS[name], device=labels.device)
        shown = torch.ones_like(wanted, dtype=torch.bool)
        if name not in _WHEREABOUTS:
            weight[0], shown = _BACKGROUND_WEIGHT, wanted > 0
        total = total + F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), weight=weight)
        right[f"patch_{name}"] = ((logits.argmax(-1) == wanted) & shown).sum() / shown.sum()
    return total, right


def referent_loss(
    heads: ClassHeads, hidden: Tensor, referents: Tensor, prefix: str = "phrase"
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of each phrase's referent, summed over the heads (some of `REFERENTS`), and accuracy."""
    columns = [list(REFERENTS).index(name) for name in heads.classes]
    named = (referents[..., columns] != UNKNOWN).any(-1)
    hidden, referents = hidden[named], referents[named][:, columns]
    total, right = hidden.new_zeros(()), {}
    for index, (name, logits) in enumerate(zip(heads.classes, heads(hidden), strict=True)):
        wanted = referents[:, index]
        count = (wanted != UNKNOWN).sum()  # may be 0 in a small batch: then the loss is 0, not NaN
        total = total + F.cross_entropy(logits, wanted, ignore_index=UNKNOWN, reduction="sum") / count.clamp(min=1)
        right[f"{prefix}_{name}"] = (logits.argmax(-1) == wanted).sum() / count
    return total, right


def answer_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over answer tokens."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=UNKNOWN)


def answers_right(logits: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Share of dialogues, by kind, whose answer tokens are all right with teacher forcing."""
    text, wanted = batch.text, batch.text.targets != UNKNOWN
    wrong = (logits.argmax(-1) != text.targets) & wanted
    slots = int(text.segments.max()) + 1
    rows = torch.arange(len(text.ids), device=wrong.device)[:, None] * slots + text.segments
    failed = torch.zeros(len(text.ids) * slots, device=wrong.device).index_put_((rows[wrong],), wrong[wrong].float())
    kinds = torch.full_like(failed, -1).index_put_((rows[wanted],), text.kinds[wanted].float())
    return {
        kind: 1 - failed[kinds == index].mean() for index, kind in enumerate(ALL_KINDS) if bool((kinds == index).any())
    }
