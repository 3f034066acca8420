"""Runs a prompt through a decoder with vision tokens withdrawn at each of several layers. Pure torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Layer: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""(positions, hidden states, residual) -> (hidden states, residual), over a whole prompt."""

Head: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(hidden states, residual) of the last layer -> logits (rows, vocab)."""


def last_logits(
    layers: Sequence[Layer],
    head: Head,
    embeds: Tensor,
    kept: Tensor,
    candidates: Collection[int],
    rows: int = 1,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits at the last `rows` positions of a prompt, with all tokens and with vision tokens withdrawn at each K.

    The full prompt passes each layer once. Before each layer K, the kept rows branch off and pass the remaining layers
    alone, at their original positions. Only one branch is in memory at a time.

    Args:
        embeds: (n, hidden) input of layer 0.
        kept: (m,) ascending rows that stay in all layers, among them the last `rows`.
        candidates: values of K, each in 1..N-1.
        positions: (n,), or (3, n) with M-RoPE; None: 0 to n - 1.

    Returns:
        (rows, vocab) with all tokens, (candidates, rows, vocab) withdrawn, by ascending K.
    """

    def last(hidden: Tensor, residual: Tensor) -> Tensor:
        return head(hidden[-rows:], residual[-rows:])

    if positions is None:
        positions = torch.arange(len(embeds), device=embeds.device)
    hidden, residual = layers[0](positions, embeds, None)
    withdrawn = []
    for index, layer in enumerate(layers[1:], start=1):
        if index in candidates:
            branch = hidden[kept], residual[kept]
            for deep in layers[index:]:
                branch = deep(positions[..., kept], *branch)
            withdrawn.append(last(*branch))
        hidden, residual = layer(positions, hidden, residual)
    return last(hidden, residual), torch.stack(withdrawn)
