"""A Llama decoder in plain torch with a KV cache of its own per layer, its weights named as in transformers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.golden.case import Row


class Decoder:
    """Layers, final norm and head of one set of weights."""

    def __init__(self, weights: Mapping[str, Tensor], model: Row) -> None:
        self.weights, self.eps = weights, model["rms_norm_eps"]
        self.layers = [Layer(weights, f"model.layers.{i}.", model) for i in range(model["num_hidden_layers"])]

    def embed(self, token: int) -> Tensor:
        """(1, hidden)"""
        return self.weights["model.embed_tokens.weight"][token : token + 1]

    def head(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """(rows, hidden) twice -> logits (rows, vocab)."""
        return F.linear(
            _norm(hidden + residual, self.weights["model.norm.weight"], self.eps), self.weights["lm_head.weight"]
        )


class Layer:
    """One pre-norm Llama layer; called as vLLM's are, it returns the MLP's output and the residual apart.

    `key` and `value`, (kv heads, tokens, head_dim), hold every token that the layer has seen, keys rotated.
    """

    def __init__(self, weights: Mapping[str, Tensor], prefix: str, model: Row) -> None:
        self.weights, self.prefix, self.eps = weights, prefix, model["rms_norm_eps"]
        self.kv_heads, self.theta = model["num_key_value_heads"], model["rope_theta"]
        self.head_dim = model["hidden_size"] // model["num_attention_heads"]
        self.key = self.value = torch.empty(self.kv_heads, 0, self.head_dim)

    def __call__(self, positions: Tensor, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """A whole prompt; what was seen before is forgotten."""
        self.key, self.value = self.key[:, :0], self.value[:, :0]
        return self.extend(positions, hidden, residual)

    def extend(self, positions: Tensor, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rows that attend to themselves and to all that was seen."""
        entered = hidden if residual is None else hidden + residual
        attended = entered + self._attend(positions, self._norm("input_layernorm", entered))
        x = self._norm("post_attention_layernorm", attended)
        gated = F.silu(self._linear("mlp.gate_proj", x)) * self._linear("mlp.up_proj", x)
        return self._linear("mlp.down_proj", gated), attended

    def _attend(self, positions: Tensor, x: Tensor) -> Tensor:
        query, key, value = (self._heads(self._linear(f"self_attn.{name}_proj", x)) for name in "qkv")
        self.key = torch.cat([self.key, self._rotate(key, positions)], dim=1)
        self.value = torch.cat([self.value, value], dim=1)
        rows, past = len(x), self.key.shape[1] - len(x)
        causal = torch.ones(rows, past + rows, dtype=torch.bool).tril(past)  # by cache slot, whatever the positions
        attended = F.scaled_dot_product_attention(
            self._rotate(query, positions), self.key, self.value, attn_mask=causal, enable_gqa=True
        )
        return self._linear("self_attn.o_proj", attended.transpose(0, 1).flatten(1))

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        half = self.head_dim // 2
        angle = positions[:, None] * self.theta ** -(torch.arange(half) / half)  # (rows, half)
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin

    def _heads(self, x: Tensor) -> Tensor:
        """(rows, heads * head_dim) -> (heads, rows, head_dim)"""
        return x.view(len(x), -1, self.head_dim).transpose(0, 1)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{self.prefix}{name}.weight"])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return _norm(x, self.weights[f"{self.prefix}{name}.weight"], self.eps)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)
