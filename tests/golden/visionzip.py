"""Checks of `reducers/visionzip.py`, by itself and behind a tower."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from foldserve.reducers.attention import LayerAttention
from foldserve.reducers.plan import Reduction, VisionGeometry, make_plan
from foldserve.reducers.visionzip import VisionZip, contextual_tokens, visionzip
from tests.golden.case import Case, Row, assert_close, assert_equal
from tests.golden.tower import Layer

TOWER_ATOL = 1e-4


def check_split(row: Row) -> None:
    assert_equal("contextual", contextual_tokens(row["kept"]), row["contextual"])
    assert_equal("dominant", row["kept"] - contextual_tokens(row["kept"]), row["dominant"])


def check_visionzip(case: Case) -> None:
    """Features, and which patches are dominant and targets; some cases have other shares than the published ones."""
    inputs, golden, params = case.read(case.inputs), case.read(case.outputs), case.params
    layer = LayerAttention(inputs["q"].transpose(1, 2), inputs["k"].transpose(1, 2), params["scale"])
    class_token = params["class_token"]
    first = int(class_token)
    score = layer.class_attention() if class_token else layer.attention_received()
    if class_token:
        score[:, 0] = torch.inf
    reduced = visionzip(inputs["hidden"], score, layer.keys(), params["dominant"], params["contextual"])
    assert_close("features", reduced.tokens, golden["features"])
    dominant, targets = (reduced.source - first).tensor_split((params["dominant"],), dim=1)
    assert_equal("dominant", dominant[:, first:], golden["dominant"])
    assert_equal("targets", targets, golden["targets"])


def check_visionzip_tower(case: Case) -> None:
    """What the served method makes of a CLIP tower's last layer that is used, after its MLP."""
    case.require(act="quick_gelu", class_token=True)
    params, weights, golden = case.params, case.read(case.inputs), case.read(case.outputs)
    geometry = VisionGeometry(params["n"] - 1, None, params["used_layer_index"] + 1, class_token=True)
    plan = make_plan(Reduction("visionzip", keep_tokens=params["kept"]), geometry)
    method = plan.reducer
    assert isinstance(method, VisionZip)
    hidden: Tensor = weights.pop("x")
    for index in range(geometry.layers):
        layer = Layer(weights, f"layers.{index}.", params)
        hidden, attention = layer.attend(hidden)
        hidden = layer.mlp(hidden)
        if f"hidden_states.{index + 1}" in golden:
            assert_close(f"hidden_states.{index + 1}", hidden, golden[f"hidden_states.{index + 1}"], TOWER_ATOL)
    seen = replace(attention, class_token=True)
    reduced = method.reduce(hidden, torch.ones(hidden.shape[:2], dtype=torch.int64), seen, plan.folds, plan)
    assert_close("features", reduced.tokens, golden["features"], TOWER_ATOL)
    assert_equal("dominant", reduced.source[:, 1 : params["dominant"]] - 1, golden["dominant"])
