"""Withdrawal, FastV and iLLaVA's decoder merge in plain PyTorch and transformers: whole sequence recomputed per token,
no cache, no vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from tests.engine.reference import Reference


class Merge(NamedTuple):
    """Before layer K the hidden state of row `at` becomes the weighted sum of `rows`."""

    at: int
    rows: list[int]
    weights: Tensor


class WithdrawingReference(Reference):
    """Modifications to the reference: rows of images leave before layer K or are merged; positions are kept."""

    def __init__(self, path: Path, layer: int) -> None:
        super().__init__(path)
        self.layer = layer

    @torch.no_grad()
    def generate(
        self,
        prompt: str,
        images: Sequence[Image.Image],
        reductions: Sequence[dict[str, object]],
        tokens: int,
        tail: Sequence[int] = (),
    ) -> tuple[list[int], list[float]]:
        """Greedy token ids and their log-probabilities; an image that ends the prompt keeps its last token."""
        plans = self.plans(images, reductions)
        ids = torch.tensor([*self.prompt_ids(prompt, plans), *tail])
        embeds = self.model.get_input_embeddings()(ids)
        image_rows = (ids[: len(ids) - len(tail)] == self.config.image_token_index).nonzero().flatten()
        kept = torch.ones(len(ids), dtype=torch.bool)
        merges: list[Merge] = []
        if images:
            embeds[image_rows] = torch.cat([self.image_features(i, p) for i, p in zip(images, plans, strict=True)])
            of_image = [rows.tolist() for rows in image_rows.split([plan.kept for plan in plans])]
            scores = last_row(self.model.model.language_model, embeds, self.layer)
            for rows, plan in zip(of_image, plans, strict=True):
                if plan.decoder == "withdraw":
                    kept[rows] = False
                elif plan.decoder != "none":
                    gone, merge = chosen(plan.decoder, rows, scores[rows].tolist(), plan.kept - plan.kept_deep)
                    kept[gone] = False
                    merges += merge
            kept[-1] = True
        out: list[int] = []
        logprobs: list[float] = []
        for _ in range(tokens):
            hidden = withdrawn_forward(self.model.model.language_model, embeds, kept, self.layer, merges)
            best, logprob = self.pick(self.model.lm_head(hidden[-1]).log_softmax(-1))
            out.append(best)
            logprobs.append(logprob)
            embeds = torch.cat([embeds, self.model.get_input_embeddings()(torch.tensor([best]))])
            kept = torch.cat([kept, torch.tensor([True])])
        return out, logprobs


def chosen(method: str, rows: list[int], scores: list[float], removed: int) -> tuple[list[int], list[Merge]]:
    """The rows of one image that go, one after the other from the lowest score on, and what iLLaVA merges them into."""
    ascending = [row for _, row in sorted(zip(scores, rows, strict=True))]
    if method == "fastv":
        return ascending[:removed], []
    weights = torch.arange(removed + 1, 0, -1, dtype=torch.float32)
    return ascending[:removed], [Merge(ascending[removed], ascending[: removed + 1], weights / weights.sum())]


@torch.no_grad()
def last_row(decoder: Any, embeds: Tensor, layer: int) -> Tensor:
    """(tokens,): softmaxed attention of the last token in layer `layer` - 1, mean over the heads."""
    hidden, positions = embeds[None], torch.arange(len(embeds))[None]
    rotary = decoder.rotary_emb(hidden, positions)
    for block in decoder.layers[: layer - 1]:
        output = block(hidden, attention_mask=None, position_embeddings=rotary, use_cache=False)
        hidden = output[0] if isinstance(output, tuple) else output
    block, usual = decoder.layers[layer - 1], decoder.config._attn_implementation
    decoder.config._attn_implementation = "eager"  # which returns its weights; without a mask, right in the last row
    _, weights = block.self_attn(block.input_layernorm(hidden), position_embeddings=rotary, attention_mask=None)
    decoder.config._attn_implementation = usual
    row: Tensor = weights[0, :, -1].mean(0)  # (heads, queries, keys)
    return row


@torch.no_grad()
def withdrawn_forward(decoder: Any, embeds: Tensor, kept: Tensor, layer: int, merges: Sequence[Merge] = ()) -> Tensor:
    """Final hidden states (kept tokens, hidden) of a transformers decoder whose layers >= `layer` see kept tokens only.

    Args:
        decoder: LlamaModel, MistralModel, Qwen2Model or Qwen3Model.
        embeds: (tokens, hidden) of one sequence.
        kept: (tokens,) bool.
        layer: K; the number of layers means that nothing is withdrawn.
        merges: what becomes of some kept rows.
    """
    hidden, positions = embeds[None], torch.arange(len(embeds))[None]
    for i, block in enumerate(decoder.layers):
        if i == layer:
            merged = [merge.weights @ hidden[0, merge.rows] for merge in merges]
            for merge, row in zip(merges, merged, strict=True):
                hidden[0, merge.at] = row
            hidden, positions = hidden[:, kept], positions[:, kept]
        rotary = decoder.rotary_emb(hidden, positions)
        output = block(hidden, attention_mask=None, position_embeddings=rotary, use_cache=False)
        hidden = output[0] if isinstance(output, tuple) else output
    normed: Tensor = decoder.norm(hidden)[0]
    return normed
