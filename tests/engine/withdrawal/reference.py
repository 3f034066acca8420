"""Withdrawal in plain PyTorch and transformers: whole sequence recomputed per token, no cache, no vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tests.engine.reference import Reference


class WithdrawingReference(Reference):
    """Modifications to the reference: withdrawn rows leave before layer K, the others keep their positions."""

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
        plans = [self.plan(reduction) for reduction in reductions]
        ids = torch.tensor([*self.prompt_ids(prompt, plans), *tail])
        embeds = self.model.get_input_embeddings()(ids)
        image_rows = (ids[: len(ids) - len(tail)] == self.config.image_token_index).nonzero().flatten()
        kept = torch.ones(len(ids), dtype=torch.bool)
        if images:
            embeds[image_rows] = torch.cat([self.image_features(i, p) for i, p in zip(images, plans, strict=True)])
            of_image = image_rows.split([plan.kept for plan in plans])
            for rows, plan in zip(of_image, plans, strict=True):
                kept[rows] = not plan.withdraw
            kept[-1] = True
        out: list[int] = []
        logprobs: list[float] = []
        for _ in range(tokens):
            hidden = withdrawn_forward(self.model.model.language_model, embeds, kept, self.layer)
            distribution = self.model.lm_head(hidden[-1]).log_softmax(-1)
            best = int(distribution.argmax())
            out.append(best)
            logprobs.append(float(distribution[best]))
            embeds = torch.cat([embeds, self.model.get_input_embeddings()(torch.tensor([best]))])
            kept = torch.cat([kept, torch.tensor([True])])
        return out, logprobs


@torch.no_grad()
def withdrawn_forward(decoder: Any, embeds: Tensor, kept: Tensor, layer: int) -> Tensor:
    """Final hidden states (kept tokens, hidden) of a transformers decoder whose layers >= `layer` see kept tokens only.

    Args:
        decoder: LlamaModel, MistralModel, Qwen2Model or Qwen3Model.
        embeds: (tokens, hidden) of one sequence.
        kept: (tokens,) bool.
        layer: K; the number of layers means that nothing is withdrawn.
    """
    hidden, positions = embeds[None], torch.arange(len(embeds))[None]
    for i, block in enumerate(decoder.layers):
        if i == layer:
            hidden, positions = hidden[:, kept], positions[:, kept]
        rotary = decoder.rotary_emb(hidden, positions)
        output = block(hidden, attention_mask=None, position_embeddings=rotary, use_cache=False)
        hidden = output[0] if isinstance(output, tuple) else output
    normed: Tensor = decoder.norm(hidden)[0]
    return normed
