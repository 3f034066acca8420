"""FastV and iLLaVA in the decoder: which of an image's tokens enter the deep layers.

Runs between the compiled parts, only in steps that start such a prompt, and never waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foldserve.reducers import METHODS
from foldserve.reducers.method import ScoredInDecoder
from foldserve.server.engine.withdrawal.batch import ImageSelection, PromptSelection


def merges_tokens(prompts: tuple[PromptSelection, ...]) -> bool:
    """Whether a method merges tokens, which needs the full output of layer K-1."""
    return any(_method(image).merges for prompt in prompts for image in prompt.images)


def last_token_scores(query: Tensor, key: Tensor, prompt: PromptSelection, scale: float) -> Tensor:
    """Attention from a prompt's last token to each of its tokens: fp32 (tokens,), mean over the heads.

    Args:
        query: (rows, heads, head size) of the whole batch, after the rotary embedding.
        key: (rows, KV heads, head size).
    """
    end = prompt.row + prompt.tokens
    keys = key[prompt.row : end].float()
    grouped = query[end - 1].float().view(keys.shape[1], -1, keys.shape[2])  # (KV heads, group, head size)
    logits = torch.einsum("hgd,nhd->hgn", grouped, keys) * scale
    return logits.softmax(-1).mean((0, 1))


def select_tokens(
    prompts: tuple[PromptSelection, ...], scores: list[Tensor], rows: Tensor, hidden: Tensor, residual: Tensor
) -> None:
    """Write the chosen rows of each image into `rows`, and merged values into `hidden` and `residual`.

    Merging is linear, so merging the two addends merges the hidden state.

    Args:
        scores: `last_token_scores` of each prompt.
        rows: (m,) rows of the batch that enter the deep layers.
        hidden, residual: (rows, d) and (rows, e) of the whole batch. Without merging, `hidden` may be the output of
            layer K-1's attention.
    """
    for prompt, of_prompt in zip(prompts, scores, strict=True):
        for image in prompt.images:
            first = image.row - prompt.row
            _select_in_image(image, of_prompt[first : first + image.tokens], rows, hidden, residual)


def _select_in_image(image: ImageSelection, scores: Tensor, rows: Tensor, hidden: Tensor, residual: Tensor) -> None:
    own = slice(image.row, image.row + image.tokens)
    x = torch.cat([hidden[own], residual[own]], dim=-1)  # (tokens, d + e)
    reduced = _method(image).reduce(x[None], scores[None], image.tokens - image.kept)
    chosen = reduced.source[0] + image.row
    rows[image.deep_row : image.deep_row + image.kept] = chosen
    hidden[chosen], residual[chosen] = torch.split(reduced.tokens[0], [hidden.shape[1], residual.shape[1]], dim=-1)


def _method(image: ImageSelection) -> ScoredInDecoder:
    method = METHODS[image.method]
    assert isinstance(method, ScoredInDecoder)  # as the plan chose it
    return method
