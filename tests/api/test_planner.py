"""What a planner refuses without a running server."""

from __future__ import annotations

from typing import Any

import pytest

from foldserve.reducers.plan import InvalidReduction, Reduction
from foldserve.server.api.errors import InvalidRequest
from foldserve.server.api.planner import Planner
from foldserve.server.api.schema import Defaults, FoldChatRequest
from foldserve.server.engine.withdrawal import Room
from foldserve.reducers.geometry import VisionGeometry

CLIP = VisionGeometry(576, (24, 24), layers=23, class_token=True)
SIGLIP = VisionGeometry(729, (27, 27), layers=26)


def request(*details: str, **fields: Any) -> FoldChatRequest:
    parts = [{"type": "image_url", "image_url": {"url": "http://x/y.png", "detail": detail}} for detail in details]
    return FoldChatRequest(messages=[{"role": "user", "content": parts}], **fields)


def planner(geometry: VisionGeometry | None = CLIP, **options: Any) -> Planner:
    return Planner(geometry, Defaults(**options), withdraw_layer=None, room=Room(100, "--max-num-batched-tokens"))


def test_defaults_and_details() -> None:
    made = planner(reduction=Reduction(method="folder_cls", ratio=0.5), low_detail_ratio=0.9)
    _, plans = made.plan(request("auto", "low", "high"))
    assert [(plan.method, plan.kept) for plan in plans] == [("folder_cls", 288), ("folder_cls", 58), ("none", 576)]
    _, plans = made.plan(request("auto", "low", reduction_ratio=0))
    assert [plan.kept for plan in plans] == [576, 576]


def test_withdraw_needs_a_layer() -> None:
    with pytest.raises(InvalidRequest, match="--withdraw-layer") as caught:
        planner().plan(request("auto", reduction={"withdraw": True}))
    assert caught.value.param == "reduction.withdraw"


def test_method_that_the_tower_has_not() -> None:
    with pytest.raises(InvalidReduction, match="folder_cls") as caught:
        planner(SIGLIP).plan(request("auto", reduction={"method": "folder_cls", "ratio": 0.5}))
    assert caught.value.param == "method"


def test_model_that_cannot_reduce() -> None:
    assert planner(None).plan(request("auto", reduction_ratio=0)) == ([Reduction()], [])
    with pytest.raises(InvalidRequest, match="can't reduce"):
        planner(None).plan(request("auto", reduction_ratio=0.5))
