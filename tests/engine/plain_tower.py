"""Vision towers of transformers walked in plain PyTorch, with every method in its place: all attention materialised."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from foldserve.reducers import METHODS
from foldserve.reducers.downsample import resize
from foldserve.reducers.folder import folder, folder_cls
from foldserve.reducers.illava import illava
from foldserve.reducers.plan import Plan
from foldserve.reducers.prumerge import most_attended, prumerge
from foldserve.reducers.random import draw
from foldserve.reducers.tome import tome, turbo


class Seen(NamedTuple):
    """Attention of one layer: query and key (1, n, heads, head_dim), probability (1, heads, n, n)."""

    query: Tensor
    key: Tensor
    probability: Tensor


class PlainTower:
    """CLIP (class token first, dropped at the end) or SigLIP of transformers, up to the last layer but one.

    Args:
        model: `vision_tower` of a LLaVA of transformers.
        class_token: it is CLIP.
    """

    def __init__(self, model: Any, *, class_token: bool) -> None:
        self.model, self.class_token = getattr(model, "vision_model", model), class_token
        self.layers = self.model.encoder.layers[:-1]

    @torch.no_grad()
    def features(self, pixels: Tensor, plan: Plan) -> Tensor:
        """(1, 3, H, W) -> (1, plan.kept, C)"""
        if plan.method == "downsample":
            assert plan.grid is not None
            patch = self.model.embeddings.patch_size
            smaller = resize(pixels, *plan.grid, patch=patch)
            hidden = self.model.embeddings(smaller, interpolate_pos_encoding=True)
        else:
            hidden = self.model.embeddings(pixels)
        if self.class_token:
            hidden = self.model.pre_layrnorm(hidden)
        sizes = torch.ones(hidden.shape[:2], dtype=torch.int64)
        for index, layer in enumerate(self.layers):
            bias = sizes.log() if plan.method in ("tome", "turbo") else hidden.new_zeros(hidden.shape[:2])
            hidden, seen = attend(layer, hidden, bias)
            for r in plan.removed_in(index) if plan.method != "folder_cls" else ():
                hidden, sizes = self._reduce(plan, hidden, sizes, seen, r)
            if plan.method == "folder_cls" and plan.removed_in(index):
                hidden = folder_cls(hidden, seen.key.mean(2), seen.probability[:, :, 0].mean(1), plan.folds).tokens
            hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
        return after_tower(hidden[:, 1:] if self.class_token else hidden, plan)

    def _reduce(self, plan: Plan, x: Tensor, sizes: Tensor, seen: Seen, r: int) -> tuple[Tensor, Tensor]:
        received = seen.probability.mean(dim=(1, 2))
        if plan.method == "illava":
            first = int(self.class_token)
            merged = illava(x[:, first:], received[:, first:], r).tokens
            return torch.cat([x[:, :first], merged], dim=1), sizes
        if plan.method == "prumerge":
            query, key = seen.query.flatten(2), seen.key.flatten(2)
            attention = (query[:, :1] @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1)[:, 0, 1:]
            selected = most_attended(attention, plan.kept - 1)
            normal = F.normalize(key[:, 1:], dim=-1)
            merged = prumerge(x[:, 1:], attention, selected, normal[:, selected[0]] @ normal.mT).tokens
            return torch.cat([x[:, :1], merged], dim=1), sizes
        if plan.method == "turbo":
            reduced = turbo(x, seen.key.mean(2), seen.probability[:, :, 0].mean(1), sizes, r)
        else:
            reduced = tome(x, seen.key.mean(2), sizes, r, class_token=self.class_token)
        return reduced.tokens, reduced.sizes


def attend(layer: Any, hidden: Tensor, bias: Tensor) -> tuple[Tensor, Seen]:
    """First half of a layer; bias: (1, n), of each key."""
    attention = layer.self_attn
    x = layer.layer_norm1(hidden)
    query, key, value = (
        project(x).unflatten(-1, (attention.num_heads, -1))
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) * attention.scale + bias[:, None, None]
    probability = logits.softmax(dim=-1)
    attended = torch.einsum("bhqk,bkhd->bqhd", probability, value).flatten(2)
    return hidden + attention.out_proj(attended), Seen(query, key, probability)


def after_tower(features: Tensor, plan: Plan) -> Tensor:
    """(1, n, C), n = plan.encoded unless tokens went before -> (1, plan.kept, C)"""
    if plan.method == "folder":
        return folder(features, plan.folds, scale="official" if "official" in plan.options else "none").tokens
    if plan.method == "random":
        return features[:, draw(plan.encoded, plan.kept, plan.seed)]
    if plan.method == "pool":
        assert plan.grid is not None
        side = int(plan.encoded**0.5)
        image = features.mT.reshape(1, -1, side, side)
        return F.adaptive_avg_pool2d(image, plan.grid).flatten(2).mT
    assert plan.method == "none" or METHODS[plan.method].stage.value != "after_tower", plan.method
    return features
