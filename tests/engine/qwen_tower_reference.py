"""Methods inside Qwen's vision towers, on plain transformers: token by token, one image at a time, windows as masks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import torch
from torch import Tensor

from tests.reducers.naive import naive_visionzip


@dataclass
class Token:
    """2 x 2 patches.

    Attributes:
        at: (row, column) of the token.
        patches: (4, width).
        levels: deepstack levels so far, (hidden,) each.
        size: tokens in it.
        held: their places.
    """

    at: tuple[int, int]
    patches: Tensor
    levels: list[Tensor]
    size: int = 1
    held: tuple[tuple[int, int], ...] = ()


def encode(
    visual: Any,
    pixels: Tensor,
    grid: tuple[int, int],
    removed: int,
    asked: Mapping[str, Any],
    entering: Collection[int] | None = None,
) -> list[Token]:
    """What is left, in raster order; each token's `levels` begin with the merger's output.

    Of all tokens only those `entering`, if they are given.
    """
    width, full = grid[1], getattr(visual, "fullatt_block_indexes", None)
    is_illava, is_visionzip = asked["method"] == "illava", asked["method"] == "visionzip"
    layers = asked.get("layers") or full or list(range(len(visual.blocks)))
    layers = [len(visual.blocks) - 1] if is_visionzip else layers
    steps = {layer: removed // len(layers) + (i < removed % len(layers)) for i, layer in enumerate(layers)}
    side = visual.config.window_size // visual.config.patch_size // 2 if full else 0
    tokens = [
        Token(at := divmod(i, width), x, [], held=(at,))
        for i, x in enumerate(_by_token(_embedded(visual, pixels, grid)))
        if entering is None or i in entering
    ]
    is_reduced = False
    for index, block in enumerate(visual.blocks):
        if full:  # tokens lie window by window
            tokens.sort(key=lambda token: (_window(token, side), token.at))
        mask = torch.zeros(len(tokens), len(tokens))
        if asked.get("proportional", not is_illava) and is_reduced:
            mask += torch.tensor([log(token.size) for token in tokens])
        if full and index not in full:
            windows = [_window(token, side) for token in tokens]
            mask += torch.tensor([[0.0 if a == b else -torch.inf for b in windows] for a in windows])
        x = torch.cat([token.patches for token in tokens])
        attended, probabilities, keys, unrotated = _attend(visual, block, x, tokens, mask)
        for token, patches in zip(tokens, _by_token(x + attended), strict=True):
            token.patches = patches
        received = probabilities.mean(0).sum(0).view(-1, 4).mean(-1).tolist()
        if steps.get(index) and not is_visionzip:
            is_reduced = True
            similar = keys.mean(0).view(len(tokens), 4, -1).mean(1)
            tokens = _into_one(tokens, received, steps[index]) if is_illava else _tome(tokens, similar, steps[index])
        x = torch.cat([token.patches for token in tokens])
        x = x + block.mlp(block.norm2(x))
        if steps.get(index) and is_visionzip:
            for token, patches in zip(tokens, _by_token(x), strict=True):
                token.patches = patches
            projections = unrotated.mean(0).view(len(tokens), 4, -1).mean(1)
            tokens = _zipped(tokens, received, projections, len(tokens) - removed)
            x = torch.cat([token.patches for token in tokens])
        taps = list(getattr(visual, "deepstack_visual_indexes", ()))
        level = visual.deepstack_merger_list[taps.index(index)](x) if index in taps else None
        for i, (token, patches) in enumerate(zip(tokens, _by_token(x), strict=True)):
            token.patches = patches
            token.levels += [] if level is None else [level[i]]
    tokens.sort(key=lambda token: token.at)
    for token in tokens:
        token.levels.insert(0, visual.merger(token.patches)[0])
    return tokens


def _by_token(x: Tensor) -> Tensor:
    return x.view(-1, 4, x.shape[-1])


def _embedded(visual: Any, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """(patches, width), as they enter the first block; Qwen2.5-VL's here still in raster order of tokens."""
    embedded: Tensor = visual.patch_embed(pixels)
    if hasattr(visual, "pos_embed"):
        seen: list[Tensor] = []
        hook = visual.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        visual(pixels, grid_thw=torch.tensor([[1, 2 * grid[0], 2 * grid[1]]]))
        hook.remove()
        embedded = seen[0]
    return embedded


def _window(token: Token, side: int) -> tuple[int, int]:
    return token.at[0] // side, token.at[1] // side


def _attend(
    visual: Any, block: Any, x: Tensor, tokens: Sequence[Token], mask: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The attention's output, (heads, patches, patches) softmaxed, keys (heads, patches, head_dim) rotated and not."""
    attention = block.attn
    query, key, value = attention.qkv(block.norm1(x)).view(len(x), 3, attention.num_heads, -1).permute(1, 2, 0, 3)
    quarter = query.shape[-1] // 4
    frequencies = 1 / 10000.0 ** (torch.arange(quarter) / quarter)
    places = [(2 * token.at[0] + i, 2 * token.at[1] + j) for token in tokens for i in range(2) for j in range(2)]
    angles = (torch.tensor(places).unsqueeze(-1) * frequencies).flatten(1).repeat(1, 2)

    def rotate(t: Tensor) -> Tensor:
        half = t.shape[-1] // 2
        return t * angles.cos() + torch.cat([-t[..., half:], t[..., :half]], -1) * angles.sin()

    query, unrotated, key = rotate(query), key, rotate(key)
    each_patch = mask.repeat_interleave(4, 0).repeat_interleave(4, 1)
    probabilities = (query @ key.mT / query.shape[-1] ** 0.5 + each_patch).softmax(-1)
    return attention.proj((probabilities @ value).transpose(0, 1).flatten(1)), probabilities, key, unrotated


def _merged(into: Token, members: Sequence[Token], weights: Sequence[float]) -> Token:
    shares = [weight / sum(weights) for weight in weights]
    each = list(zip(shares, members, strict=True))
    patches = torch.stack([share * token.patches for share, token in each]).sum(0)
    levels = [torch.stack([share * token.levels[i] for share, token in each]).sum(0) for i in range(len(into.levels))]
    held = tuple(at for token in members for at in token.held)
    return Token(into.at, patches, levels, sum(token.size for token in members), held)


def _zipped(tokens: list[Token], received: list[float], keys: Tensor, kept: int) -> list[Token]:
    places = sorted(range(len(tokens)), key=lambda i: tokens[i].at)
    in_order = [tokens[i] for i in places]
    columns = [torch.cat([token.patches.flatten(), *token.levels]) for token in in_order]
    contextual = kept * 5 // 32
    score = torch.tensor([received[i] for i in places])
    members, values = naive_visionzip(torch.stack(columns), score, keys[places], kept - contextual, contextual)
    left = []
    for (i, *_), value in zip(members, values, strict=True):
        token, widths = in_order[i], [in_order[i].patches.numel(), *(len(level) for level in in_order[i].levels)]
        patches, *levels = value.split_with_sizes(widths)
        left.append(Token(token.at, patches.view_as(token.patches), levels))
    return left


def _into_one(tokens: list[Token], received: list[float], removed: int) -> list[Token]:
    lowest = sorted(range(len(tokens)), key=lambda i: received[i])[: removed + 1]
    merged = _merged(tokens[lowest[-1]], [tokens[i] for i in lowest], list(range(removed + 1, 0, -1)))
    return [merged if i == lowest[-1] else token for i, token in enumerate(tokens) if i not in lowest[:-1]]


def _tome(tokens: list[Token], keys: Tensor, removed: int) -> list[Token]:
    keys = keys.double() / keys.double().norm(dim=-1, keepdim=True)
    best = []
    for even in range(0, len(tokens), 2):
        scores = [float(keys[even] @ keys[odd]) for odd in range(1, len(tokens), 2)]
        partner = max(range(len(scores)), key=lambda i: scores[i])
        best.append((-scores[partner], even, 2 * partner + 1))
    best.sort()
    left = [tokens[even] for _, even, _ in best[removed:]]
    for odd in range(1, len(tokens), 2):
        members = [tokens[odd], *(tokens[even] for _, even, into in best[:removed] if into == odd)]
        left.append(_merged(tokens[odd], members, [token.size for token in members]))
    return left
