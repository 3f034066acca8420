"""Checks of `reducers/illava.py` and `reducers/fastv.py`, and of the score that both need."""

from __future__ import annotations

import torch
from torch import Tensor

from foldserve.reducers.attention import LayerAttention
from foldserve.reducers.fastv import FastV, fastv
from foldserve.reducers.illava import IllavaDecoder, illava, image_score
from tests.golden.case import Case, Row, assert_close, assert_equal
from tests.golden.tower import check_illava_tower


def check_illava_vit(case: Case) -> None:
    """Features and kept tokens from a score, from attention, or from the weights of whole layers."""
    if "layers" in case.params:
        check_illava_tower(case)
        return
    inputs, golden = case.read(case.inputs), case.read(case.outputs)
    if "attn" in inputs:
        score = layer_that_attends(inputs["attn"]).attention_received()
        assert_close("score", score, golden["score"], atol=1e-6)
    else:
        score = inputs["score"]
    reduced = illava(inputs["x"], score, case.params["r"])
    assert_close("features", reduced.tokens, golden["features"])
    assert_equal("keep_index", reduced.source, golden["keep_index"])


def check_illava_llm(case: Case) -> None:
    """Hidden states and positions of a whole prompt with one image in it."""
    inputs, golden, params = case.read(case.inputs), case.read(case.outputs), case.params
    if params["keep_ratio"] is not None:
        check_illava_removed({"L": params["image_len"], "keep": params["keep_ratio"], "r": params["r"]})
    score = image_score(inputs["last_row_attn"], _is_image(case))
    reduced = illava(inputs["hidden"], score, params["r"])
    assert_close("hidden", reduced.tokens, golden["hidden"])
    assert_equal("position_ids", reduced.source, golden["position_ids"])


def check_fastv(case: Case) -> None:
    """The same, nothing merged."""
    inputs, golden, params = case.read(case.inputs), case.read(case.outputs), case.params
    check_fastv_kept({"L": params["image_len"], "drop": params["drop_ratio"], "kept": params["kept"]})
    score = image_score(inputs["last_row_attn"], _is_image(case))
    reduced = fastv(inputs["hidden"], score, params["image_len"] - params["kept"])
    assert_equal("position_ids", reduced.source, golden["position_ids"])
    assert_equal("hidden", reduced.tokens, golden["hidden"])


def check_illava_removed(row: Row) -> None:
    """L, keep -> r"""
    assert_equal(f"r of {row}", IllavaDecoder().removed(row["L"], 1 - row["keep"]), row["r"])


def check_fastv_kept(row: Row) -> None:
    """L, drop -> kept"""
    assert_equal(f"kept of {row}", row["L"] - FastV().removed(row["L"], row["drop"]), row["kept"])


def layer_that_attends(probability: Tensor) -> LayerAttention:
    """(B, heads, n, n) -> queries and keys that give it: the logits are its logarithms."""
    batch, heads, n, _ = probability.shape
    key = torch.eye(n).expand(batch, heads, n, n)
    return LayerAttention(probability.log().transpose(1, 2), key.transpose(1, 2), scale=1.0)


def _is_image(case: Case) -> Tensor:
    position = torch.arange(case.params["seq"])
    start = case.params["image_start"]
    return ((position >= start) & (position < start + case.params["image_len"])).unsqueeze(0)
