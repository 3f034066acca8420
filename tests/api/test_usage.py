"""What is reported of a rendered prompt's vision tokens, and what is refused of it."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.multimodal.inputs import PlaceholderRange

from foldserve.reducers.item import ItemPlan, Layout, plan_item
from foldserve.reducers.plan import Reduction, VisionGeometry
from foldserve.server.api.errors import FoldserveError, InvalidRequest
from foldserve.server.api.usage import vision_tokens
from foldserve.server.engine.identity import ItemIdentity
from foldserve.server.engine.withdrawal import StepCapacity

CLIP = Layout.single(VisionGeometry(144, (12, 12), layers=3, class_token=True))
ROOM = StepCapacity(200, "--max-num-batched-tokens 215 less one for each of 15 other sequences")


def plan(reduction: dict[str, object]) -> ItemPlan:
    return plan_item(Reduction.parse(reduction), CLIP)


def prompt(plans: list[ItemPlan], text: int) -> Any:
    """Images one after the other, and `text` tokens behind them."""
    ends = [sum(p.kept for p in plans[: i + 1]) for i in range(len(plans))]
    places = [PlaceholderRange(offset=end - p.kept, length=p.kept) for end, p in zip(ends, plans, strict=True)]
    decoders = [None if p.decoder == "none" else p.decoder for p in plans]
    kept = [p.kept_deep if decoder else 0 for p, decoder in zip(plans, decoders, strict=True)]
    hashes = [str(ItemIdentity(f"{i}", None, *each)) for i, each in enumerate(zip(decoders, kept, strict=True))]
    ids = [0] * (ends[-1] + text)
    return {"prompt_token_ids": ids, "mm_placeholders": {"image": places}, "mm_hashes": {"image": hashes}}


@pytest.mark.parametrize("method", ["fastv", "illava_decoder"])
def test_tokens_removed_in_the_decoder_are_withdrawn(method: str) -> None:
    plans = [plan({"method": f"folder+{method}", "ratio": 0.5, "decoder_ratio": 0.25})]
    vision = vision_tokens({"image": plans}, prompt(plans, 9), 4, ROOM)
    assert vision is not None
    assert (vision.encoded, vision.kept, vision.withdrawn) == (144, 72, 18)
    assert vision.to_json() == {
        "encoded": 144,
        "kept": 72,
        "withdrawn": 18,
        "method": "folder",
        "ratio": 0.5,
        "withdraw_layer": 4,
        "decoder": method,
    }


def test_images_with_modes_of_their_own() -> None:
    plans = [plan({"withdraw": True, "ratio": 0.75}), plan({"method": "fastv"}), plan({"keep_tokens": 9})]
    vision = vision_tokens({"image": plans}, prompt(plans, 5), 4, StepCapacity(300, "none"))
    assert vision is not None
    assert vision.withdrawn_each == (36, 72, 0) and vision.decoder == "mixed"


def test_a_prompt_that_no_step_can_hold_is_the_clients_error() -> None:
    plans = [plan({"method": "fastv"})]
    assert vision_tokens({"image": plans}, prompt(plans, 56), 4, ROOM) is not None
    with pytest.raises(
        InvalidRequest, match=r"has 201 tokens, and a step has room for 200 \(--max-num-batched"
    ) as caught:
        vision_tokens({"image": plans}, prompt(plans, 57), 4, ROOM)
    assert caught.value.param == "messages"


def test_another_number_of_placeholders_than_planned_is_our_error() -> None:
    plans = [plan({"ratio": 0.5})]
    with pytest.raises(FoldserveError, match=r"holds \[72\] vision tokens where \[144\] were planned"):
        vision_tokens({"image": [plan({})]}, prompt(plans, 9), 4, ROOM)


def test_videos_are_listed_beside_images() -> None:
    plans = [plan({"ratio": 0.5}), plan({"withdraw": True}), plan({"ratio": 0.5})]
    mixed = prompt(plans, 9)
    for field in ("mm_placeholders", "mm_hashes"):
        first, second, third = mixed[field]["image"]
        mixed[field] = {"video": [second], "image": [first, third]}
    vision = vision_tokens({"video": [plans[1]], "image": [plans[0], plans[2]]}, mixed, 4, ROOM)
    assert vision is not None
    assert (vision.modalities, vision.withdrawn_each) == (("image", "video", "image"), (0, 144, 0))
    body = vision.to_json()
    image = {"encoded": 144, "kept": 72, "withdrawn": 0, "method": "folder", "ratio": 0.5}
    assert body["images"] == [image, image]
    assert body["videos"] == [{"encoded": 144, "kept": 144, "withdrawn": 144, "method": "none", "ratio": 0.0}]
    assert "images" not in vision.to_header() and "videos" not in vision.to_header()
