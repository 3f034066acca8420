"""Checks of `reducers/prumerge.py`; the authors' adaptive choice, which can't be served, is implemented here."""

from __future__ import annotations

import torch
from torch import Tensor

from foldserve.reducers.attention import LayerAttention
from foldserve.reducers.prumerge import most_attended, prumerge
from tests.golden.case import Case, assert_close, assert_equal


def check_prumerge(case: Case) -> None:
    """Features of one image, in the authors' order: by attention, then what the plus variant adds, then the rest."""
    inputs, golden, params = case.read(case.inputs), case.read(case.outputs), case.params
    layer = LayerAttention(inputs["q"].unsqueeze(2), inputs["k"].unsqueeze(2), scale=1.0)
    attention = layer.class_attention_as_one_head()[:, 1:]
    share = outliers(attention) if params["adaptive"] else params["reduction_ratio"]
    assert_equal("topk", int(attention.shape[1] * share), params["topk"])
    selected = most_attended(attention, params["topk"])
    if params["plus"]:
        selected = torch.cat([selected, spread(selected, attention.shape[1], share)], dim=1)
    cosine = layer.key_cosine(1 + selected)[..., 1:]
    reduced = prumerge(inputs["features_with_cls"][:, 1:], attention, selected, cosine)
    assert_close("features", reduced.tokens, golden["features"])


def outliers(attention: Tensor) -> float:
    """Share of tokens with more attention than the upper quartile plus 1.5 interquartile ranges."""
    low, high = attention.quantile(torch.tensor([0.25, 0.75]))
    return (attention > high + 1.5 * (high - low)).sum().item() / attention.numel()


def spread(selected: Tensor, n: int, share: float) -> Tensor:
    """(1, m) -> (1, more): tokens at equal distances, three per selected one, that are not selected yet."""
    evenly = torch.arange(0, n - 1, int(int(1 / share) / 3))
    return evenly[~torch.isin(evenly, selected)].unsqueeze(0)
