"""A CLIP vision tower in plain torch, with `folder_cls` in one of its layers: checks where the fold stands."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from foldserve.reducers import METHODS
from foldserve.reducers.fold import Reduced
from foldserve.reducers.folder import folder_cls
from tests.golden.case import Case, Row, assert_close, assert_equal


def check_folder_tower(case: Case) -> None:
    """Hidden states of every layer, sizes, and the features that LLaVA would select."""
    case.require(metric="keys mean over heads", act="quick_gelu")
    folds = METHODS["folder_cls"].schedule(case.params["n"] - 1, case.params["r"])
    assert_equal("fold_schedule", list(folds), case.params["fold_schedule"])

    weights, golden = case.read(case.inputs), case.read(case.outputs)
    hidden = weights.pop("x")
    assert_close("hidden_states.0", hidden, golden["hidden_states.0"])
    for index in range(case.params["layers"]):
        layer = Layer(weights, f"layers.{index}.", case.params)
        hidden = hidden + layer.attend(hidden)
        if index == case.params["fold_layer_index"]:
            reduced = layer.fold(hidden, folds)
            assert_equal("size", reduced.sizes, golden["size"][:, 1:].squeeze(-1).long())
            hidden = torch.cat([hidden[:, :1], reduced.tokens], dim=1)
        hidden = hidden + layer.mlp(hidden)
        assert_close(f"hidden_states.{index + 1}", hidden, golden[f"hidden_states.{index + 1}"])
        if index == case.params["layers"] - 2:
            assert_close("selected_features", hidden[:, 1:], golden["selected_features"])


class Layer:
    """One pre-norm CLIP encoder layer, its weights named as in transformers."""

    def __init__(self, weights: Mapping[str, Tensor], prefix: str, params: Row) -> None:
        self.weights, self.prefix = weights, prefix
        self.heads, self.eps = params["heads"], params["ln_eps"]
        self.attention_weight = params["attn_weight"]

    def attend(self, hidden: Tensor) -> Tensor:
        """(B, n, d) -> what is added after attention; keeps what `fold` needs."""
        x = self._norm("layer_norm1", hidden)
        query, key, value = (self._heads(self._linear(f"self_attn.{name}_proj", x)) for name in "qkv")
        probability = (query @ key.mT * query.shape[-1] ** -0.5).softmax(dim=-1)  # (B, heads, n, n)
        self.keys = key.mean(dim=1)  # (B, n, head_dim)
        self.cls_attention = probability[:, :, 0].mean(dim=1)  # (B, n)
        return self._linear("self_attn.out_proj", (probability @ value).transpose(1, 2).flatten(2))

    def fold(self, hidden: Tensor, folds: tuple[int, ...]) -> Reduced:
        return folder_cls(hidden, self.keys, self.cls_attention, folds, attention_weight=self.attention_weight)

    def mlp(self, hidden: Tensor) -> Tensor:
        x = self._linear("mlp.fc1", self._norm("layer_norm2", hidden))
        return self._linear("mlp.fc2", x * torch.sigmoid(1.702 * x))  # quick_gelu

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, *self._parameters(name))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *self._parameters(name), eps=self.eps)

    def _parameters(self, name: str) -> tuple[Tensor, Tensor]:
        return self.weights[f"{self.prefix}{name}.weight"], self.weights[f"{self.prefix}{name}.bias"]

    def _heads(self, x: Tensor) -> Tensor:
        """(B, n, d) -> (B, heads, n, head_dim)"""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)
