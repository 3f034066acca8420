"""Compiles the kernels before a server serves; Triton compiles a variant at its first launch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from foldserve.reducers.divprune import divprune
from foldserve.reducers.folder import folder, folder_cls
from foldserve.reducers.illava import illava
from foldserve.reducers.tome import tome, turbo
from foldserve.reducers.withdraw import kv_slots

_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Widths:
    """Widths of the tensors that a model reduces. Kernel variants depend on them and the dtype, not on token counts."""

    tower: int
    head: int  # of the tower
    projected: int | None = None  # input of methods after the tower, if that is projected already; None: `tower`
    deciding: int | None = None  # columns by which methods after the tower compare tokens; None: all
    embedding: int | None = None  # input of methods after the projector; None: as after the tower
    decoder: int | None = None  # None: the decoder does not withdraw tokens


def warm_up(widths: Widths, dtype: torch.dtype, device: torch.device) -> None:
    """Reduce zeros by each method that has kernels, in every way in which a server launches them."""
    x = torch.zeros(1, _TOKENS, widths.tower, dtype=dtype, device=device)
    keys = torch.zeros(1, _TOKENS, widths.head, dtype=torch.float32, device=device)
    score, sizes = keys[..., 0].contiguous(), torch.ones(1, _TOKENS, dtype=torch.int64, device=device)
    two_folds = (4, 2)
    after_tower = x if widths.projected is None else x.new_zeros(1, _TOKENS, widths.projected)
    folder(after_tower, two_folds, metric=after_tower[..., : widths.deciding])
    embeddings = after_tower if widths.embedding is None else x.new_zeros(1, _TOKENS, widths.embedding)
    divprune(embeddings, 2, metric=embeddings[..., : widths.deciding], rest="merge")
    divprune(embeddings, 2, metric=embeddings[..., : widths.deciding], geometry="centered")
    folder_cls(x, keys, score, two_folds)
    for class_token in (False, True):
        tome(x, keys, sizes, 2, class_token=class_token)
    turbo(x, keys, score, sizes, 2)
    illava(x, score, 2)
    if widths.decoder is not None:
        addends = torch.zeros(1, _TOKENS, 2 * widths.decoder, dtype=dtype, device=device)
        illava(addends, score, 2)
        rows = torch.zeros(_TOKENS, dtype=torch.int64, device=device)
        kv_slots(rows[None].int(), rows, rows, _TOKENS, len(rows))
