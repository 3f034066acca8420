"""A CLIP or SigLIP vision tower in plain torch: checks where in a layer `folder_cls` and `illava` act."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from foldserve.reducers.attention import LayerAttention
from foldserve.reducers.folder import folder_cls
from foldserve.reducers.illava import illava
from foldserve.reducers.schedule import fold_schedule
from tests.golden.case import Case, Row, assert_close, assert_equal


def check_folder_tower(case: Case) -> None:
    """Hidden states of every layer, sizes, and the features that LLaVA would select."""
    case.require(metric="keys mean over heads", act="quick_gelu")
    folds = fold_schedule(case.params["n"], case.params["r"])
    assert_equal("fold_schedule", list(folds), case.params["fold_schedule"])

    weights, golden = case.read(case.inputs), case.read(case.outputs)
    hidden = weights.pop("x")
    assert_close("hidden_states.0", hidden, golden["hidden_states.0"])
    for index in range(case.params["layers"]):
        layer = Layer(weights, f"layers.{index}.", case.params)
        hidden, attention = layer.attend(hidden)
        if index == case.params["fold_layer_index"]:
            weight = case.params["attn_weight"]
            reduced = folder_cls(hidden, attention.keys(), attention.class_attention(), folds, attention_weight=weight)
            assert_equal("size", reduced.sizes, golden["size"].squeeze(-1).long())
            hidden = reduced.tokens
        hidden = layer.mlp(hidden)
        assert_close(f"hidden_states.{index + 1}", hidden, golden[f"hidden_states.{index + 1}"])
        if index == case.params["layers"] - 2:
            assert_close("selected_features", hidden[:, 1:], golden["selected_features"])


def check_illava_tower(case: Case) -> None:
    """Hidden states after each of some SigLIP layers that all remove r tokens."""
    case.require(act="gelu_pytorch_tanh")
    weights, golden = case.read(case.inputs), case.read(case.outputs)
    hidden = weights.pop("x")
    for index in range(case.params["layers"]):
        layer = Layer(weights, f"layers.{index}.", case.params)
        hidden, attention = layer.attend(hidden)
        hidden = layer.mlp(illava(hidden, attention.attention_received(), case.params["r"]).tokens)
        assert_close(f"hidden_{index}", hidden, golden[f"hidden_{index}"])


class Layer:
    """One pre-norm encoder layer, its weights named as in transformers."""

    def __init__(self, weights: Mapping[str, Tensor], prefix: str, params: Row) -> None:
        self.weights, self.prefix, self.act = weights, prefix, params["act"]
        self.heads, self.eps = params["heads"], params["ln_eps"]

    def attend(self, hidden: Tensor) -> tuple[Tensor, LayerAttention]:
        """(B, n, d) -> the same after attention, and what it was made of."""
        x = self._norm("layer_norm1", hidden)
        query, key, value = (self._heads(self._linear(f"self_attn.{name}_proj", x)) for name in "qkv")
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        attention = LayerAttention(query, key, query.shape[-1] ** -0.5)
        return hidden + self._linear("self_attn.out_proj", attended), attention

    def mlp(self, hidden: Tensor) -> Tensor:
        """(B, n, d) -> the same after the MLP."""
        x = self._linear("mlp.fc1", self._norm("layer_norm2", hidden))
        x = x * torch.sigmoid(1.702 * x) if self.act == "quick_gelu" else F.gelu(x, approximate="tanh")
        return hidden + self._linear("mlp.fc2", x)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, n, d) -> (B, n, heads, head_dim)"""
        return x.view(*x.shape[:2], self.heads, -1)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, *self._parameters(name))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *self._parameters(name), eps=self.eps)

    def _parameters(self, name: str) -> tuple[Tensor, Tensor]:
        return self.weights[f"{self.prefix}{name}.weight"], self.weights[f"{self.prefix}{name}.bias"]
