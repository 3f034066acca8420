"""The attention of one tower layer, as methods see it. Everything is computed on demand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from foldserve.reducers.fold import at_least_fp32, true_fp32

_QUERIES_AT_ONCE = 64


def _identity(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True, slots=True, eq=False)
class LayerAttention:
    """Queries and keys of one layer. Results have at least fp32 and are equal on all tensor-parallel ranks."""

    query: Tensor  # (B, n, heads of this rank, head_dim)
    key: Tensor  # the same shape, with bias
    scale: float
    key_bias: Tensor | None = None  # (B, n), added to the logits of every query; ln(size) in proportional attention
    class_token: bool = False  # token 0 is the class token
    ranks: int = 1  # tensor-parallel ranks, which have equally many heads
    mean_over_ranks: Callable[[Tensor], Tensor] = _identity
    unrotated_key: Tensor | None = None  # `key` before rotary position embedding, if the tower uses it

    def keys(self) -> Tensor:
        """(B, n, head_dim): mean over heads of the keys, after rotary position embedding."""
        return self._mean_over_heads(self.key)

    def key_projections(self) -> Tensor:
        """(B, n, head_dim): mean over heads of the keys, before rotary position embedding."""
        return self._mean_over_heads(self.key if self.unrotated_key is None else self.unrotated_key)

    def class_attention(self) -> Tensor:
        """(B, n): softmaxed attention from the class token to every token, mean over heads."""
        return self.mean_over_ranks(self._probabilities(self.query[:, :1], self._keys_by_head()).mean(dim=(1, 2)))

    def attention_received(self) -> Tensor:
        """(B, n): softmaxed attention that each key receives, mean over heads and queries.

        Works on 64 queries at a time, so it holds 2 x B x heads x 64 x n numbers instead of B x heads x n x n.
        """
        keys = self._keys_by_head()
        received = keys.new_zeros(keys.shape[0], keys.shape[-1])  # (B, n)
        for block in torch.split(self.query, _QUERIES_AT_ONCE, dim=1):
            received += self._probabilities(block, keys).sum(dim=2).mean(dim=1)
        return self.mean_over_ranks(received / self.query.shape[1])

    def class_attention_as_one_head(self) -> Tensor:
        """(B, n): softmaxed attention from the class token, with all heads concatenated into one."""
        query, key = at_least_fp32(self.query[:, :1]).flatten(2), at_least_fp32(self.key).flatten(2)
        with true_fp32():
            logits = (query @ key.mT).squeeze(1)  # (B, n), over the heads of this rank
        width = self.ranks * key.shape[-1]
        return (self.mean_over_ranks(logits) * (self.ranks / sqrt(width))).softmax(dim=-1)

    def key_cosine(self, index: Tensor) -> Tensor:
        """(B, m) token indices -> (B, m, n): cosine of their keys to all keys, heads concatenated."""
        key = at_least_fp32(self.key).flatten(2)
        chosen = key.gather(1, index.unsqueeze(-1).expand(-1, -1, key.shape[-1]))
        with true_fp32():
            products = self.mean_over_ranks(chosen @ key.mT)
        norm = self.mean_over_ranks(key.square().sum(dim=-1)).sqrt()  # as in `products`, 1 / ranks cancels
        return products / (norm.gather(1, index).unsqueeze(-1) * norm.unsqueeze(1))

    def _mean_over_heads(self, key: Tensor) -> Tensor:
        return self.mean_over_ranks(at_least_fp32(key).mean(dim=2))

    def _keys_by_head(self) -> Tensor:
        """(B, heads, head_dim, n)"""
        return at_least_fp32(self.key).permute(0, 2, 3, 1)

    def _probabilities(self, query: Tensor, keys: Tensor) -> Tensor:
        """(B, m, heads, head_dim) -> (B, heads, m, n)"""
        with true_fp32():
            logits = at_least_fp32(query).transpose(1, 2) @ keys * self.scale
        if self.key_bias is not None:
            logits = logits + self.key_bias[:, None, None]
        return logits.softmax(dim=-1)


@dataclass(frozen=True, slots=True, eq=False)
class PatchAttention(LayerAttention):
    """Attention of a tower with several adjacent patches per token: queries and keys per patch, results per token."""

    patches: int = 1

    def attention_received(self) -> Tensor:
        received = LayerAttention.attention_received(self)
        return received.reshape(len(received), -1, self.patches).mean(dim=2)

    def _mean_over_heads(self, key: Tensor) -> Tensor:
        keys = LayerAttention._mean_over_heads(self, key)
        return keys.reshape(len(keys), -1, self.patches, keys.shape[-1]).mean(dim=2)
