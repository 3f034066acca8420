"""What a planner refuses without a running server."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from foldserve.reducers.geometry import VisionGeometry
from foldserve.reducers.plan import InvalidReduction, Reduction
from foldserve.server.api.errors import InvalidRequest
from foldserve.server.api.planner import Planner
from foldserve.server.api.schema import FoldChatRequest
from foldserve.server.engine.withdrawal import Room
from foldserve.server.settings import Settings

CLIP = VisionGeometry(576, (24, 24), layers=23, class_token=True)
SIGLIP = VisionGeometry(729, (27, 27), layers=26)


def request(*details: str, **fields: Any) -> FoldChatRequest:
    parts = [{"type": "image_url", "image_url": {"url": "http://x/y.png", "detail": detail}} for detail in details]
    return FoldChatRequest(messages=[{"role": "user", "content": parts}], **fields)


def planner(geometry: VisionGeometry | None = CLIP, **options: Any) -> Planner:
    return Planner(geometry, Settings(**options), Room(100, "--max-num-batched-tokens"))


def test_defaults_and_details() -> None:
    made = planner(default_reduction=Reduction(method="folder_cls", ratio=0.5), low_detail_ratio=0.9)
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


def test_positions_that_the_server_cannot_keep() -> None:
    with pytest.raises(InvalidRequest, match="can't keep positions") as caught:
        planner().plan(request("auto", reduction={"ratio": 0.5, "positions": "keep"}))
    assert caught.value.param == "reduction.positions"


def test_positions_default_and_what_a_request_says() -> None:
    keeping = replace(planner(positions="keep"), positions=4096)

    def kept(**fields: Any) -> list[bool]:
        return [plan.keeps_positions for plan in keeping.plan(request("auto", **fields))[1]]

    assert kept(reduction_ratio=0.5) == [True]
    assert kept(reduction={"ratio": 0.5, "positions": "renumber"}) == [False]
    assert kept(reduction_ratio=0) == kept() == [False]
    assert keeping.plan(request("auto"))[0] == [Reduction()]


@pytest.mark.parametrize(
    ("asked", "prompt", "left"), [(None, 300, 12), (12, 300, 12), (13, 300, None), (None, 311, 1), (None, 312, None)]
)
def test_no_position_beyond_the_models(asked: int | None, prompt: int, left: int | None) -> None:
    """Half of 576 tokens leave gaps of 288; the model knows 600 positions."""
    keeping = replace(planner(), positions=600)
    asking = request("auto", reduction={"ratio": 0.5, "positions": "keep"}, max_completion_tokens=asked)
    _, plans = keeping.plan(asking)
    if left is None:
        with pytest.raises(InvalidRequest, match="600 positions"):
            keeping.check_positions(plans, prompt, asking)
    else:
        keeping.check_positions(plans, prompt, asking)
        assert asking.max_completion_tokens == left
