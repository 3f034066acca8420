"""What a planner refuses without a running server."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from vllm.config import VllmConfig

from foldserve.reducers.geometry import Stage, VisionGeometry
from foldserve.reducers.item import ItemPlan, Layout, Part, plan_item
from foldserve.reducers.plan import InvalidReduction, Reduction
from foldserve.server.api.errors import InvalidRequest, LimitExceeded
from foldserve.server.api.limits.checks import shares
from foldserve.server.api.planner import Planner, with_request_param
from foldserve.server.api.schema import FoldChatRequest
from foldserve.server.auto import AutoPolicy
from foldserve.server.engine.default_plan import default_plan
from foldserve.server.engine.encoder_budget import EncoderBudget
from foldserve.server.engine.family import Family, Modality
from foldserve.server.engine.withdrawal import StepCapacity
from foldserve.server.settings import CONFIG_KEY, Settings

CLIP = VisionGeometry(576, (24, 24), layers=23, class_token=True)
SHOWN = replace(CLIP, shows_tower=True)
SIGLIP = VisionGeometry(729, (27, 27), layers=26)


RECURRENT = VisionGeometry(
    729,
    (27, 27),
    layers=26,
    stages=frozenset({Stage.AFTER_TOWER}),
    decoder_refusal="and it forgets nothing",
)
"""Before a decoder in which nothing can be removed."""


def request(*details: str, **fields: Any) -> FoldChatRequest:
    parts = [{"type": "image_url", "image_url": {"url": "http://x/y.png", "detail": detail}} for detail in details]
    return FoldChatRequest(messages=[{"role": "user", "content": parts}], **fields)


class OneSize(Family):
    """Every image has one layout."""

    def __init__(self, layout: Layout) -> None:
        self.largest = layout

    @classmethod
    def of(cls, hf_config: Any) -> None:
        raise NotImplementedError

    def encode(self, *args: Any) -> Any:
        raise NotImplementedError

    def kept_grids(self, *args: Any) -> Any:
        raise NotImplementedError


class Tiles(OneSize):
    """An image is a row of tiles, behind each a separator: its size decides how many, four at most."""

    shape_ints = 1

    def layout(self, shape: tuple[int, ...]) -> Layout:
        return Layout((Part(SIGLIP, count=shape[0], separators=shape[0]),), shape)


def planner(geometry: VisionGeometry | None = CLIP, **options: Any) -> Planner:
    family = None if geometry is None else OneSize(Layout.single(geometry))
    return Planner(family, Settings(**options), StepCapacity(100, "--max-num-batched-tokens"))


def plans(planner: Planner, request: FoldChatRequest) -> list[ItemPlan]:
    """As the processor makes them."""
    assert planner.family is not None
    return [plan_item(reduction, planner.family.largest) for reduction in planner.check(request)["image"]]


def test_defaults_and_details() -> None:
    made = planner(default_reduction=Reduction(method="folder_cls", ratio=0.5), low_detail_ratio=0.9)
    found = plans(made, request("auto", "low", "high"))
    assert [(plan.method, plan.kept) for plan in found] == [("folder_cls", 288), ("folder_cls", 58), ("none", 576)]
    found = plans(made, request("auto", "low", reduction_ratio=0))
    assert [plan.kept for plan in found] == [576, 576]


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings(default_reduction=Reduction(ratio=0.5)),
        Settings(default_reduction=Reduction(ratio=0.5), positions="keep"),
        Settings(default_reduction=Reduction(ratio=0.5, positions="renumber"), positions="keep"),
        Settings(default_reduction=Reduction(decoder="withdraw", ratio=0.5), withdraw_layer=4),
    ],
    ids=lambda settings: str(settings.default_reduction),
)
def test_the_engine_expects_the_plan_of_a_request_that_says_nothing(settings: Settings) -> None:
    family, config = OneSize(Layout.single(CLIP)), SimpleNamespace(additional_config={CONFIG_KEY: settings.to_config()})
    made = Planner(family, settings, StepCapacity(1000, "--max-num-batched-tokens"), positions=4096)
    assert plans(made, request("auto")) == [default_plan(cast(VllmConfig, config), family, family.largest)]


def test_withdraw_needs_a_layer() -> None:
    with pytest.raises(InvalidRequest, match="--withdraw-layer") as caught:
        planner().check(request("auto", reduction={"withdraw": True}))
    assert caught.value.param == "reduction.withdraw"


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"withdraw": True}, "withdraw"),
        ({"method": "fastv", "ratio": 0.5}, "method"),
        ({"method": "folder+fastv", "ratio": 0.5}, "method"),
    ],
    ids=str,
)
def test_no_layer_is_asked_for_where_none_would_do(asked: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidReduction, match="in the decoder, and it forgets nothing: choose") as caught:
        planner(RECURRENT).check(request("auto", reduction=asked))
    assert caught.value.param == param
    assert planner(RECURRENT).check(request("auto", reduction={"ratio": 0.5}))
    with pytest.raises(InvalidReduction, match="in the decoder, which this model does not allow: choose"):
        planner(replace(RECURRENT, decoder_refusal="")).check(request("auto", reduction=asked))


def test_method_that_the_tower_has_not() -> None:
    with pytest.raises(InvalidReduction, match="folder_cls") as caught:
        planner(SIGLIP).check(request("auto", reduction={"method": "folder_cls", "ratio": 0.5}))
    assert caught.value.param == "method"


def test_model_that_cannot_reduce() -> None:
    assert planner(None).check(request("auto", reduction_ratio=0)) == {"image": [Reduction()]}
    with pytest.raises(InvalidRequest, match="can't be reduced"):
        planner(None).check(request("auto", reduction_ratio=0.5))


def test_positions_that_the_server_cannot_keep() -> None:
    with pytest.raises(InvalidRequest, match="can't keep positions") as caught:
        planner().check(request("auto", reduction={"ratio": 0.5, "positions": "keep"}))
    assert caught.value.param == "reduction.positions"


def test_positions_default_and_what_a_request_says() -> None:
    keeping = replace(planner(positions="keep"), positions=4096)

    def kept(**fields: Any) -> list[bool]:
        return [plan.keeps_positions for plan in plans(keeping, request("auto", **fields))]

    assert kept(reduction_ratio=0.5) == [True]
    assert kept(reduction={"ratio": 0.5, "positions": "renumber"}) == [False]
    assert kept(reduction_ratio=0) == kept() == [False]
    assert keeping.check(request("auto")) == {"image": [Reduction()]}


@pytest.mark.parametrize(
    ("asked", "prompt", "left"), [(None, 300, 12), (12, 300, 12), (13, 300, None), (None, 311, 1), (None, 312, None)]
)
def test_no_position_beyond_the_models(asked: int | None, prompt: int, left: int | None) -> None:
    """Half of 576 tokens leave gaps of 288; the model knows 600 positions."""
    keeping = replace(planner(), positions=600)
    asking = request("auto", reduction={"ratio": 0.5, "positions": "keep"}, max_completion_tokens=asked)
    found = plans(keeping, asking)
    if left is None:
        with pytest.raises(InvalidRequest, match="600 positions"):
            keeping.check_positions(found, prompt, asking)
    else:
        keeping.check_positions(found, prompt, asking)
        assert asking.max_completion_tokens == left


def test_what_depends_on_the_images_size_is_not_refused_before_it_is_known() -> None:
    family = Tiles(Tiles.layout(OneSize(Layout.single(SIGLIP)), (4,)))  # type: ignore[arg-type]
    tiled = replace(planner(), family=family)
    asking = request("auto", reduction={"keep_tokens": 1000})
    (reduction,) = tiled.check(asking)["image"]
    assert plan_item(reduction, family.layout((4,))).kept == 1000
    with pytest.raises(InvalidReduction, match="give 3 to 730") as caught:
        plan_item(reduction, family.layout((1,)))
    assert caught.value.param == "keep_tokens"
    with pytest.raises(InvalidReduction, match="folder_cls"):
        tiled.check(request("auto", reduction={"method": "folder_cls", "ratio": 0.5}))


class Films(OneSize):
    """Images of one size, and videos of so many frames of that size."""

    modalities = ("image", "video")
    shape_ints = 1

    def layout(self, shape: tuple[int, ...]) -> Layout:
        return Layout((Part(CLIP, max(1, shape[0]), can_join=shape[0] > 0),), shape)


def test_a_default_of_videos_alone_leaves_images_whole() -> None:
    default = Reduction("evs", "withdraw", ratio=0.5)
    family = Films(Layout((Part(CLIP),), (0,)))
    films = Planner(family, Settings(default_reduction=default, withdraw_layer=4), StepCapacity(100, "--max-model-len"))
    film: Any = {"type": "video_url", "video_url": {"url": "http://x/y.mp4"}}
    asking = FoldChatRequest(
        messages=[{"role": "user", "content": [film, *({**film, "detail": detail} for detail in ("low", "high"))]}]
    )
    found = films.check(asking)["video"]
    assert [(one.method, one.ratio) for one in found] == [("evs", 0.5), ("evs", 0.75), ("folder", None)]
    found = films.check(request("auto", "low"))["image"]
    assert [(one.method, one.ratio, one.decoder) for one in found] == [
        ("folder", None, "withdraw"),
        ("folder", 0.75, "withdraw"),
    ]
    with pytest.raises(InvalidReduction, match="is for videos") as caught:
        films.check(request("auto", reduction={"method": "evs", "ratio": 0.5}))
    assert caught.value.param == "method"


class Anyres(Tiles):
    """One base tile, and a mosaic of as many below each other: see `Tiling`."""

    tile = replace(SIGLIP, any_resolution=True)

    def __init__(self) -> None:
        super().__init__(self.layout((4,)))

    def layout(self, shape: tuple[int, ...]) -> Layout:
        return Layout((Part(SIGLIP), Part(SIGLIP, count=shape[0], separators=27)), shape, self)

    def base(self, shape: tuple[int, ...]) -> Layout:
        return Layout((Part(SIGLIP, separators=1),), shape, self)

    def of_squares(self, shape: tuple[int, ...], side: int) -> Layout:
        return self.layout(shape)


def anyres(**options: Any) -> Planner:
    return Planner(Anyres(), Settings(**options), StepCapacity(100, "--max-num-batched-tokens"))


def asked(planner: Planner, *details: str, **fields: Any) -> list[Reduction]:
    """Without the positions that are filled in."""
    return [replace(reduction, positions=None) for reduction in planner.check(request(*details, **fields))["image"]]


def test_low_detail_is_the_base_tile_unless_the_operator_chose_a_ratio() -> None:
    default = Reduction("random", "withdraw", ratio=0.5)
    options: dict[str, Any] = {"default_reduction": default, "withdraw_layer": 4}
    base = Reduction(decoder="withdraw", first="base_only")
    assert asked(anyres(**options), "auto", "low", "high") == [default, base, Reduction()]
    assert asked(anyres(**options, low_detail_ratio=0.9), "low") == [replace(default, ratio=0.9)]
    assert asked(planner(), "low") == [Reduction(ratio=0.75)]


def test_several_images_may_be_their_base_tiles() -> None:
    """Where nothing else is asked, and together with what the server does to every image."""
    bases, base = anyres(several_images="base"), Reduction(first="base_only")
    assert asked(bases, "auto") == [Reduction()]
    assert asked(bases, "auto", "high", "low") == [base, Reduction(), base]
    assert asked(bases, "auto", "auto", reduction_ratio=0.5) == [Reduction(ratio=0.5)] * 2
    halved = anyres(several_images="base", default_reduction=Reduction(ratio=0.5))
    assert asked(halved, "auto", "auto") == [Reduction(ratio=0.5, first="base_only")] * 2
    with pytest.raises(ValueError, match="lays images out in tiles"):
        planner(several_images="base")


def test_what_is_said_of_a_prompt_that_is_too_long() -> None:
    """Frames where they are equal; a base tile is one grid of an image's two."""
    film, tiles = Layout((Part(CLIP, 4, can_join=True),), (4,)), Anyres()
    plans: dict[Modality, list[ItemPlan]] = {
        "image": [plan_item(Reduction(first="base_only"), tiles.layout((3,)))],
        "video": [plan_item(Reduction(method, ratio=0.5), film) for method in ("folder", "evs")],
    }
    assert "(image: 730, video: 4 frames of 288, video: 1152)" in shares(plans, 5000, 4096)


@pytest.mark.parametrize("method", ["base_only", "illava", "downsample", "base_only+random"])
def test_what_acts_on_tiles_is_checked_before_they_are_known(method: str) -> None:
    amount = {} if method == "base_only" else {"ratio": 0.51}
    assert len(anyres().check(request("auto", reduction={"method": method, **amount}))["image"]) == 1
    with pytest.raises(InvalidReduction, match="leaves no grid of tokens in a tile"):
        anyres().check(request("auto", reduction={"method": "tome", "ratio": 0.5}))
    with pytest.raises(InvalidReduction, match="laid out in tiles") as caught:
        planner().check(request("auto", reduction={"method": "base_only"}))
    assert caught.value.param == "method"


def image(name: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"http://x/{name}.png"}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [text("Look:"), image("a"), image("b"), text("which is red?")]},
    {"role": "assistant", "content": "The first."},
    {"role": "user", "content": "And the other?"},
    {"role": "user", "content": [image("c")]},
]


def queries(turns: list[dict[str, Any]], planner: Planner, **fields: Any) -> list[str | None]:
    return [one.query for one in planner.check(FoldChatRequest(messages=turns, **fields))["image"]]


def test_an_image_is_asked_about_by_the_message_that_it_is_in() -> None:
    """Whatever later turns say, unless the request has a query of its own; methods that take none get none."""
    covering = {"method": "mmtok", "ratio": 0.5}
    served = planner(SHOWN)
    of_the_turn = "Look:\nwhich is red?"
    assert queries(TURNS[:2], served, reduction=covering) == [of_the_turn] * 2
    assert queries(TURNS, served, reduction=covering) == [of_the_turn, of_the_turn, ""]
    assert queries(TURNS, served, reduction=covering | {"query": "cat"}) == ["cat"] * 3
    assert queries(TURNS, served, reduction=covering | {"query": ""}) == [""] * 3
    assert queries(TURNS, served, reduction={"ratio": 0.5}) == queries(TURNS, served) == [None] * 3
    by_default = planner(SHOWN, default_reduction=Reduction.parse(covering))
    assert queries(TURNS[:2], by_default) == [of_the_turn] * 2
    assert queries(TURNS[:2], by_default, reduction_ratio=0.9) == [None] * 2
    long = [{"role": "user", "content": [image("a"), text("x" * 5000)]}]
    assert queries(long, served, reduction=covering) == ["x" * 4096]


@pytest.mark.parametrize("under_load", [False, True])
def test_auto_asks_about_an_image_as_a_number_does(under_load: bool) -> None:
    policy = AutoPolicy(Reduction(method="mmtok"), 0.05, (4, 8), {"default": 4})
    served = planner(SHOWN, auto=policy)
    asked = {"ratio": "auto", "under_load": under_load}
    of_the_turn = "Look:\nwhich is red?"
    assert queries(TURNS, served, reduction=asked) == [of_the_turn, of_the_turn, ""]
    assert queries(TURNS[:2], served, reduction_ratio="auto") == [of_the_turn] * 2
    assert queries(TURNS, served, reduction=asked | {"method": "mmtok", "query": "cat"}) == ["cat"] * 3
    other = planner(SHOWN, auto=AutoPolicy(Reduction(), 0.05, (4, 8), {"default": 4}))
    assert queries(TURNS, other, reduction=asked) == [None] * 3


def test_a_pixel_cap_needs_a_model_whose_tokens_are_cells() -> None:
    policy = AutoPolicy(Reduction(), 0.05, (4, 8), {"default": 16}, pixel_cap=2)
    with pytest.raises(ValueError, match="`--pixel-cap none`"):
        planner(SHOWN, auto=policy)
    served = planner(replace(SHOWN, takes_cells=True), auto=policy, positions="keep")
    with pytest.raises(InvalidRequest, match="keep positions"):  # some tokens may go, so that positions matter
        served.check(request("auto", reduction_ratio="auto"))


def test_low_detail_leaves_the_servers_query_to_methods_that_take_it() -> None:
    default = Reduction.parse({"method": "base_only+mmtok", "ratio": 0.5, "query": "cat"})
    assert asked(anyres(default_reduction=default), "low") == [Reduction(first="base_only")]


@pytest.mark.parametrize(
    ("fields", "param", "named"),
    [
        ({"reduction_ratio": 0.5}, "ratio", "reduction_ratio"),
        ({"reduction_ratio": 0.5}, "positions", "positions"),
        ({"reduction": {"ratio": 0.5}}, "ratio", "ratio"),
    ],
)
def test_a_refusal_names_the_field_that_the_request_has(fields: dict[str, Any], param: str, named: str) -> None:
    assert with_request_param(InvalidReduction("too small", param), request("auto", **fields)).param == named


def test_what_the_tower_was_not_tried_with_is_refused_whatever_is_kept() -> None:
    measured = replace(planner(), encoder=EncoderBudget(tokens=576, images=1, cache_rows=576))
    of_one, of_two = (plan_item(Reduction(ratio=0.9), Layout((Part(CLIP, count=count),))) for count in (1, 2))
    measured.check_sizes({"image": [of_one, of_one]})
    with pytest.raises(LimitExceeded, match=r"video 2 of 2 has 1152 tokens before reduction.* takes 576 at once"):
        measured.check_sizes({"video": [of_one, of_two]})
