"""One walk through a decoder that ends once for every layer at which vision tokens may leave it. Pure torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Layer: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""(positions, hidden states, residual) -> (hidden states, residual), over a whole prompt; their sum is what goes on."""

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
    """Logits at the last positions of a prompt, with all its tokens and with vision tokens withdrawn at each candidate.

    The prompt passes each layer once; before layer K, for each K of `candidates`, the kept rows branch off and take the
    rest of the way alone, with the positions they had. One state at a time is held.

    Args:
        layers: the N layers of the decoder.
        embeds: (n, hidden) input of layer 0.
        kept: (m,) rows that stay at all layers, ascending; the last `rows` of the prompt are among them.
        candidates: values of K, each in 1..N-1.
        rows: how many positions, the last ones.
        positions: (n,), or (3, n) with M-RoPE; None: 0 to n - 1.

    Returns:
        (rows, vocab) with all tokens, (number of candidates, rows, vocab) withdrawn, by ascending K.
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
