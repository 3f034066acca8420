"""Vision towers of transformers walked in plain PyTorch, with every method in its place: all attention materialised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isqrt
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from foldserve.reducers import METHODS
from foldserve.reducers.downsample import resize
from foldserve.reducers.fold import Reduced
from foldserve.reducers.folder import folder, folder_cls
from foldserve.reducers.illava import illava
from foldserve.reducers.method import AfterProjector
from foldserve.reducers.plan import Plan
from foldserve.reducers.prumerge import most_attended, prumerge
from foldserve.reducers.random import draw_indices
from foldserve.reducers.tome import tome, turbo
from tests.engine import plain_diversity
from tests.reducers.naive import naive_visionzip

Project = Callable[[Tensor], Tensor]
"""Tokens (1, n, C) -> (1, n, hidden)"""

Groups: TypeAlias = list[tuple[int, list[int]]]
"""For each token that stays, in order, its own number and all that are in it."""


def as_they_are(tokens: Tensor) -> Tensor:
    return tokens


class Seen(NamedTuple):
    """Attention of one layer: query and key (1, n, heads, head_dim), probability (1, heads, n, n)."""

    query: Tensor
    key: Tensor
    probability: Tensor


class PlainTower:
    """CLIP (class token first, dropped at the end) or SigLIP of transformers.

    Args:
        model: `vision_tower` of a LLaVA of transformers.
        layers: that run; None: all but the last.
        class_token: it is CLIP.
    """

    def __init__(self, model: Any, layers: int | None = None, *, class_token: bool) -> None:
        self.model, self.class_token = getattr(model, "vision_model", model), class_token
        self.layers = self.model.encoder.layers[: -1 if layers is None else layers]

    def features(
        self, pixels: Tensor, plan: Plan, project: Project = as_they_are, entering: Tensor | None = None
    ) -> Tensor:
        """(B, 3, H, W) -> (B, plan.kept, hidden); B = 1 but for iLLaVA and `downsample`."""
        return self.survivors(pixels, plan, project, entering)[0]

    @torch.no_grad()
    def survivors(
        self, pixels: Tensor, plan: Plan, project: Project = as_they_are, entering: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(1, 3, H, W) -> (1, plan.kept, hidden), and the token of the whole image that each of them stands for.

        Of the patches only those `entering`, if they are given.
        """
        features, source, _ = self._walk(pixels, plan, entering)
        tokens, source = after_tower(features, source, plan, project)
        return tokens, source if entering is None else entering[source]

    @torch.no_grad()
    def members(
        self, pixels: Tensor, plan: Plan, project: Project = as_they_are, entering: Tensor | None = None
    ) -> list[list[int]]:
        """Of each token that stays, in order, the tokens of the whole image that are in it."""
        features, _, held = self._walk(pixels, plan, entering)
        found = _groups(features, plan, held, project)
        return found if entering is None else [[int(entering[i]) for i in own] for own in found]

    def _walk(
        self, pixels: Tensor, plan: Plan, entering: Tensor | None = None
    ) -> tuple[Tensor, Tensor, list[list[int]]]:
        """The tower's output, which token each stands for, and those that are in it."""
        if plan.method == "downsample":
            assert plan.grid is not None
            patch = self.model.embeddings.patch_size
            smaller = resize(pixels, *plan.grid, patch=patch)
            hidden = self.model.embeddings(smaller, interpolate_pos_encoding=True)
        else:
            hidden = self.model.embeddings(pixels)
        if entering is not None:
            first = int(self.class_token)
            hidden = torch.cat([hidden[:, :first], hidden[:, first + entering]], dim=1)
        if self.class_token:
            hidden = self.model.pre_layrnorm(hidden)
        sizes = torch.ones(hidden.shape[:2], dtype=torch.int64)
        source = torch.arange(hidden.shape[1]).expand(hidden.shape[:2])
        held = [[i] for i in range(hidden.shape[1])]
        for index, layer in enumerate(self.layers):
            bias = sizes.log() if plan.method in ("tome", "turbo") else hidden.new_zeros(hidden.shape[:2])
            hidden, seen = attend(layer, hidden, bias)
            for r in plan.removed_in(index) if plan.method not in ("folder_cls", "visionzip") else ():
                hidden, sizes, kept, group = self._reduce(plan, hidden, sizes, seen, r)
                held = joined(held, group)
                source = source.gather(1, kept)
            if plan.method == "folder_cls" and plan.removed_in(index):
                attention = seen.probability[:, :, 0].mean(1)
                hidden, _, source, group = folder_cls(hidden, seen.key.mean(2), attention, plan.folds)
                held = joined(held, group)
            hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
            if plan.method == "visionzip" and plan.removed_in(index):
                return self._zipped(plan, hidden[0], seen)
        if self.class_token:
            hidden, source = hidden[:, 1:], source[:, 1:] - 1
            held = [[i - 1 for i in own] for own in held[1:]]
        return hidden, source, held

    def _zipped(self, plan: Plan, x: Tensor, seen: Seen) -> tuple[Tensor, Tensor, list[list[int]]]:
        """What the last layer gives, (n, d), and its attention -> what `survivors` gives, and `members`."""
        first, (in_prompt,) = int(self.class_token), plan.options
        received = seen.probability[0, :, 0].sum(0) if self.class_token else seen.probability.mean(dim=(1, 2))[0]
        contextual, keys = plan.kept * 5 // 32, seen.key.mean(2)[0]
        patches = plan.kept - contextual - int(bool(in_prompt))
        members, tokens = naive_visionzip(x[first:], received[first:], keys[first:], patches, contextual)
        source, held = [each[0] for each in members], [sorted(each) for each in members]
        if in_prompt:
            source, tokens, held = [-1, *source], [x[0], *tokens], [[], *held]
        return torch.stack(tokens)[None], torch.tensor([source]), held

    def _reduce(self, plan: Plan, x: Tensor, sizes: Tensor, seen: Seen, r: int) -> Reduced:
        received = seen.probability.mean(dim=(1, 2))
        if plan.method == "illava":
            first = int(self.class_token)
            return behind(x[:, :first], illava(x[:, first:], received[:, first:], r))
        if plan.method == "prumerge":
            query, key = seen.query.flatten(2), seen.key.flatten(2)
            attention = (query[:, :1] @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1)[:, 0, 1:]
            selected = most_attended(attention, plan.kept - 1)
            normal = F.normalize(key[:, 1:], dim=-1)
            return behind(x[:, :1], prumerge(x[:, 1:], attention, selected, normal[:, selected[0]] @ normal.mT))
        if plan.method == "turbo":
            return turbo(x, seen.key.mean(2), seen.probability[:, :, 0].mean(1), sizes, r)
        return tome(x, seen.key.mean(2), sizes, r, class_token=self.class_token)


def _groups(features: Tensor, plan: Plan, held: list[list[int]], project: Project) -> list[list[int]]:
    """What a method after the tower puts into each token that stays; or what is in it already."""
    side = isqrt(plan.encoded)
    if plan.method in GROUPS:
        return [members for _, members in GROUPS[plan.method](_compared(features, plan, project), plan)]
    if plan.method == "folder":
        group = folder(features, plan.folds).group[0].tolist()
    elif plan.grid is not None:  # of windows, or of places in a smaller image
        rows, columns = plan.grid
        group = [
            int((i // side + 0.5) * rows / side) * columns + int((i % side + 0.5) * columns / side)
            for i in range(plan.encoded)
        ]
    else:
        return held
    return [[i for i, one in enumerate(group) if one == kept] for kept in range(plan.kept)]


def joined(held: list[list[int]], group: Tensor) -> list[list[int]]:
    """What is in each token once those of a batch of one went into `group` (1, n)."""
    after: dict[int, list[int]] = {}
    for own, into in zip(held, group[0].tolist(), strict=True):
        after[into] = sorted([*after.get(into, ()), *own])
    return [after[i] for i in range(len(after))]


def behind(class_token: Tensor, patches: Reduced) -> Reduced:
    """The class token (1, 1, d) in front again; (1, 0, d) of a tower without one."""
    first = class_token.shape[1]
    sizes, source, group = (
        F.pad(x, (first, 0)) for x in (patches.sizes, patches.source + first, patches.group + first)
    )
    return Reduced(torch.cat([class_token, patches.tokens], dim=1), sizes, source, group)


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


def after_tower(features: Tensor, source: Tensor, plan: Plan, project: Project = as_they_are) -> tuple[Tensor, Tensor]:
    """(1, n, C), n = plan.encoded unless tokens went before -> (1, plan.kept, hidden), and what each stands for."""
    if plan.method in GROUPS:
        tokens = _compared(features, plan, project)
        groups = GROUPS[plan.method](tokens, plan)
        means = torch.stack([tokens[members].mean(dim=0) for _, members in groups])[None]
        is_projected = isinstance(METHODS[plan.method], AfterProjector)
        return means if is_projected else project(means), torch.tensor([[own for own, _ in groups]])
    tokens, source = _of_tower(features, source, plan)
    return project(tokens), source


def _compared(features: Tensor, plan: Plan, project: Project) -> Tensor:
    """(1, n, C) -> the tokens (n, d) among which the method chooses."""
    return (project(features) if isinstance(METHODS[plan.method], AfterProjector) else features)[0]


def _diverse(tokens: Tensor, plan: Plan) -> Groups:
    geometry, rest = plan.options if plan.method == "divprune" else ("plain", "drop")
    return plain_diversity.groups(plan.method, tokens.numpy(), plan.kept, str(geometry), str(rest))


def _drawn(tokens: Tensor, plan: Plan) -> Groups:
    return [(i, [i]) for i in draw_indices(plan.encoded, plan.kept, plan.seed).tolist()]


GROUPS: Mapping[str, Callable[[Tensor, Plan], Groups]] = {
    **dict.fromkeys(plain_diversity.METHODS, _diverse),
    "random": _drawn,
}
"""Methods after the tower, or after the projector, whose output tokens are means: the groups of tokens (n, d)."""


def _of_tower(features: Tensor, source: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """As `after_tower`, (1, plan.kept, C)."""
    side = isqrt(plan.encoded)
    if plan.method == "folder":
        reduced = folder(features, plan.folds, scale="official" if "official" in plan.options else "none")
        return reduced.tokens, reduced.source
    if plan.method == "pool":
        assert plan.grid is not None
        image = features.mT.reshape(1, -1, side, side)
        (rows, columns), whole = plan.grid, torch.arange(plan.encoded).view(side, side)
        first = whole[:: side // rows, :: side // columns]  # of each window
        return F.adaptive_avg_pool2d(image, plan.grid).flatten(2).mT, first.reshape(1, -1)
    if plan.method == "downsample":
        assert plan.grid is not None
        rows, columns = plan.grid
        centres = [
            (int((i + 0.5) * side / rows), int((j + 0.5) * side / columns)) for i in range(rows) for j in range(columns)
        ]
        return features, torch.tensor([[i * side + j for i, j in centres]])
    assert plan.method == "none" or METHODS[plan.method].stage.value != "after_tower", (
        f"{plan.method!r} has no plain version: give it one in GROUPS of tests/engine/plain_tower.py"
    )
    return features, source
