"""The registered methods: what they count, and what they refuse and by which field."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foldserve.reducers import METHODS
from foldserve.reducers.attention import LayerAttention
from foldserve.reducers.base_only import BaseOnly
from foldserve.reducers.fold import Reduced
from foldserve.reducers.item import Layout, plan_item
from foldserve.reducers.method import (
    AcrossFrames,
    AfterLastLayer,
    AfterProjector,
    AfterTower,
    InDecoder,
    InProjector,
    InTower,
    Kind,
    SideInputs,
)
from foldserve.reducers.plan import InvalidReduction, Plan, Reduction, VisionGeometry, make_plan
from tests.reducers.check import assert_fp32_inside, assert_nothing_read, assert_same_bits_alone, draw

CLIP = VisionGeometry(576, (24, 24), 23, class_token=True, shows_tower=True)
SIGLIP = VisionGeometry(729, (27, 27), 26)
QWEN2_5 = VisionGeometry(
    256, (16, 16), 32, windowed_layers=tuple(layer for layer in range(32) if layer % 8 < 7), varies=True
)
ALL_WINDOWS = replace(QWEN2_5, windowed_layers=tuple(range(32)))
LARGE = VisionGeometry(4225, (65, 65), 32, varies=True, shows_tower=True)
NO_GRID = VisionGeometry(577, None, 23, class_token=True)
STF = VisionGeometry(144, projector="stf", stages=frozenset())
FREE = [name for name, method in METHODS.items() if not isinstance(method, BaseOnly | InDecoder | InProjector)]


@st.composite
def geometries(draw_: st.DrawFn) -> VisionGeometry:
    grid = draw_(st.tuples(st.integers(2, 12), st.integers(2, 12)))
    layers, class_token = draw_(st.integers(1, 12)), draw_(st.booleans())
    return VisionGeometry(grid[0] * grid[1], grid, layers, class_token, shows_tower=True)


@given(geometries(), st.sampled_from(FREE), st.data())
def test_a_method_leaves_what_its_plan_says(geometry: VisionGeometry, method: str, data: st.DataObject) -> None:
    """On any model and for any amount: a plan, or a refusal that names a field that was sent."""
    amount: dict[str, Any] = data.draw(
        st.fixed_dictionaries({"ratio": st.floats(0, 1, exclude_max=True)})
        | st.fixed_dictionaries({"keep_tokens": st.integers(2, geometry.tokens)})
    )
    options: dict[str, Any] = {"layers": [0]} if method == "illava" else {}
    try:
        plan = make_plan(Reduction.parse({"method": method, **options, **amount}), geometry)
    except InvalidReduction as refusal:
        assert refusal.param in {"method", *amount}
        return
    assert plan.kept == geometry.tokens - plan.removed >= 2
    assert plan.removed == sum(plan.folds)
    assert plan.kept == amount.get("keep_tokens", plan.kept)
    assert plan.removed >= int(geometry.tokens * amount.get("ratio", 0))
    assert Plan.from_ints(plan.to_ints(), geometry) == plan
    if plan.grid:
        assert plan.grid[0] * plan.grid[1] == plan.kept
    if not plan.is_identity:
        assert run(plan, geometry) == plan.kept


@pytest.mark.parametrize("name", METHODS)
def test_a_method_does_with_tokens_what_its_kind_says(name: str) -> None:
    """One that drops leaves the others as they were; one that merges loses none."""
    method, geometry = METHODS[name], VisionGeometry(144, (12, 12), 6, class_token=True, shows_tower=True)
    if isinstance(method, AcrossFrames):
        geometry = VisionGeometry(144, frames=4)
    if isinstance(method, AfterTower):
        plan = make_plan(Reduction.parse({"method": name, "ratio": 0.75}), geometry)
        (x,) = draw(1, (1, geometry.tokens, 8))
        side: dict[str, Any] = {"side": SideInputs(x)} if isinstance(method, AfterProjector) else {}
        assert isinstance(plan.reducer, AfterTower)
        reduced = plan.reducer.reduce(x, plan, **side)
        is_dropped = bool((reduced.group == -1).any())
        assert method.kind == (Kind.DROP if is_dropped else Kind.MERGE)
        if is_dropped:
            assert torch.equal(reduced.tokens[0], x[0, reduced.source[0]])
    elif isinstance(method, AfterLastLayer):
        assert method.kind in (Kind.MERGE, Kind.DROP)
    elif isinstance(method, InTower | InProjector):
        assert method.kind == Kind.MERGE  # `test_a_method_leaves_what_its_plan_says` counts what it merges
    elif isinstance(method, InDecoder):
        assert method.kind == Kind.DECODER
    else:
        assert method.kind == Kind.INPUT


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if isinstance(method, AfterTower)])
def test_the_rules_of_methods_after_the_tower(name: str) -> None:
    """The same bits alone as in a batch; decisions in fp32, by the first `width` columns; no wait for the device."""
    is_across_frames = isinstance(METHODS[name], AcrossFrames)
    geometry = VisionGeometry(144, frames=4) if is_across_frames else VisionGeometry(144, (12, 12), shows_tower=True)
    plan = make_plan(Reduction.parse({"method": name, "ratio": 0.75}), geometry)
    x, tower = draw(2, (3, 144, 32), (3, 144, 16))

    def reduce(x: Tensor, tower: Tensor, width: int | None = None) -> Reduced:
        method = plan.reducer
        if isinstance(method, AfterProjector):
            return method.reduce(x, plan, width, SideInputs(tower))
        assert isinstance(method, AfterTower)
        return method.reduce(x, plan, width)

    assert_same_bits_alone(reduce, x, tower)
    assert_fp32_inside(reduce, x, tower)
    assert_nothing_read(reduce, x, tower)
    assert torch.equal(reduce(x, tower, 16).source, reduce(x[..., :16].contiguous(), tower).source)


def test_a_method_that_rounds_down_leaves_two_tokens_or_refuses() -> None:
    small = VisionGeometry(4, (2, 2), 1)
    with pytest.raises(InvalidReduction, match="would leave 1 of 4") as refusal:
        make_plan(Reduction.parse({"method": "downsample", "ratio": 0.5}), small)
    assert refusal.value.param == "ratio"


def run(plan: Plan, geometry: VisionGeometry) -> int:
    """Tokens that are left when the plan's method has run over random tokens of two images."""
    method = plan.reducer
    first = int(geometry.class_token and isinstance(method, InTower))
    (x,) = draw(plan.removed, (2, geometry.tokens + first, 8))
    if isinstance(method, AfterTower):
        side: dict[str, Any] = {"side": SideInputs(x)} if isinstance(method, AfterProjector) else {}
        reduced = method.reduce(x, plan, **side)
        assert_distinct(reduced.source)
        assert reduced.sizes.shape == reduced.source.shape == reduced.tokens.shape[:2]
        return reduced.tokens.shape[1]
    if not isinstance(method, InTower):  # before the tower, which then sees the smaller grid
        assert plan.grid is not None
        return plan.grid[0] * plan.grid[1]
    sizes = torch.ones(x.shape[:2], dtype=torch.int64)
    for layer in range(geometry.layers):
        if removed := plan.removed_in(layer):
            query, key = draw(layer, (2, x.shape[1], 2, 4), (2, x.shape[1], 2, 4))
            attention = LayerAttention(query, key, 0.5, class_token=bool(first))
            before, class_token = x.shape[1], x[:, :first]
            x, sizes, source, group = method.reduce(x, sizes, attention, removed, plan)
            assert (source.shape, group.shape) == (x.shape[:2], (2, before))
            assert_distinct(source)
            if isinstance(method, AfterLastLayer):  # which may drop tokens, the class token too
                assert torch.equal(sizes.sum(dim=1), (group >= 0).sum(dim=1))
                return x.shape[1]
            assert x.shape[1] == before - sum(removed)
            assert torch.equal(x[:, :first], class_token)
            assert (sizes.sum(dim=1) == geometry.tokens + first).all()
    return x.shape[1] - first


def assert_distinct(source: torch.Tensor) -> None:
    """No two tokens stand for the same one: else they would have the same position."""
    assert (source.sort(dim=1).values.diff(dim=1) > 0).all()


REFUSED: list[tuple[VisionGeometry, dict[str, Any], str, str]] = [
    (CLIP, {"method": "illava", "ratio": 0.5, "layers": [5, 23]}, "layers", "0 to 22"),
    (VisionGeometry(144, (12, 12), 3), {"method": "illava", "ratio": 0.5}, "layers", "0 to 2"),
    (QWEN2_5, {"method": "illava", "ratio": 0.5, "layers": [7, 8]}, "layers", r"layers \[8\] .* \[7, 15, 23, 31\]"),
    (QWEN2_5, {"method": "illava", "ratio": 0.5, "layers": [5, 6, 7, 8]}, "layers", r"layers \[5, 6, 8\]"),
    (
        QWEN2_5,
        {"method": "tome", "ratio": 0.99},
        "ratio",
        "205 in the 4 layers",
    ),
    (CLIP, {"method": "illava", "ratio": 0.5, "layers": [-1]}, "layers", "from 0 on"),
    (CLIP, {"method": "illava", "ratio": 0.5, "layers": []}, "layers", "from 0 on"),
    (CLIP, {"method": "illava", "ratio": 0.999}, "ratio", "2 have to stay"),
    (CLIP, {"method": "tome", "ratio": 0.99}, "ratio", "at most half"),
    (CLIP, {"method": "tome", "keep_tokens": 2}, "keep_tokens", "at most half"),
    (CLIP, {"method": "turbo", "ratio": 0.99}, "ratio", "at most half"),
    (SIGLIP, {"method": "turbo", "ratio": 0.5}, "method", "needs a class token"),
    (SIGLIP, {"method": "prumerge", "ratio": 0.5}, "method", "needs a class token"),
    (SIGLIP, {"method": "folder_cls", "ratio": 0.5}, "method", "needs a class token"),
    (ALL_WINDOWS, {"method": "visionzip", "ratio": 0.5}, "method", "attends within windows"),
    (SIGLIP, {"method": "visionzip", "ratio": 0.5, "class_token": True}, "class_token", "has none"),
    (
        CLIP,
        {"method": "visionzip", "ratio": 0.5, "class_token": True, "positions": "keep"},
        "class_token",
        "'renumber'",
    ),
    (CLIP, {"method": "visionzip", "ratio": 0.5, "class_token": 1}, "class_token", "true or false"),
    (SIGLIP, {"method": "mmtok", "ratio": 0.5}, "method", "compares what enters the projector"),
    (
        LARGE,
        {"method": "mmtok", "ratio": 0.5},
        "method",
        "takes too long of 4225: send an image of 4096 tokens or less",
    ),
    (CLIP, {"method": "mmtok", "ratio": 0.5, "query_form": "words"}, "query_form", "'keywords' or 'question'"),
    (CLIP, {"method": "pool", "ratio": 0.5}, "ratio", r"0.75 \(144 tokens\) or 0.8889 \(64 tokens\)"),
    (CLIP, {"method": "pool", "keep_tokens": 143}, "keep_tokens", "144 tokens"),
    (CLIP, {"method": "pool", "ratio": 0.7, "window": "row"}, "ratio", "0.5 .288 tokens"),
    (CLIP, {"method": "pool", "ratio": 0.75, "window": "round"}, "window", "'square' or 'row'"),
    (NO_GRID, {"method": "pool", "ratio": 0.75}, "method", "needs a grid"),
    (NO_GRID, {"method": "downsample", "ratio": 0.5}, "method", "needs a grid"),
    (CLIP, {"method": "downsample", "keep_tokens": 287}, "keep_tokens", "next lower number is 285"),
    (STF, {"method": "folder_cls", "ratio": 0.5}, "method", "'stf'"),
    (STF, {"method": "stf", "ratio": 0.5}, "ratio", "144 tokens per image"),
    (CLIP, {"method": "random", "ratio": 0.5, "layers": [1]}, "layers", "takes no layers"),
    (CLIP, {"method": "fastv", "keep_tokens": 100}, "keep_tokens", "takes a ratio"),
    (CLIP, {"method": "fastv", "ratio": 0.9999}, "decoder_ratio", "all 576"),
]


@pytest.mark.parametrize(("geometry", "asked", "param", "told"), REFUSED, ids=[str(case[1]) for case in REFUSED])
def test_refused(geometry: VisionGeometry, asked: dict[str, Any], param: str, told: str) -> None:
    with pytest.raises(InvalidReduction, match=told) as refusal:
        plan_item(Reduction.parse(asked), Layout.single(geometry))
    assert refusal.value.param == param


@pytest.mark.parametrize("method", ["folder", "illava", "random"])
def test_any_resolution_needs_a_square(method: str) -> None:
    squares = VisionGeometry(729, (27, 27), 26, any_resolution=True)
    options = {"layers": [5, 6, 7, 8]} if method == "illava" else {}
    assert make_plan(Reduction.parse({"method": method, "keep_tokens": 361, **options}), squares).kept == 361
    with pytest.raises(InvalidReduction, match=r"give ratio 0.5049 \(361 tokens of 729\)") as refusal:
        make_plan(Reduction.parse({"method": method, "keep_tokens": 380, **options}), squares)
    assert refusal.value.param == "keep_tokens"


def test_illavas_own_setting_on_siglip() -> None:
    """92 tokens in each of four layers leave 19 x 19 of 27 x 27."""
    plan = make_plan(Reduction("illava", keep_tokens=361), SIGLIP)
    assert plan.steps == ((92, 5), (92, 6), (92, 7), (92, 8))


def test_layers_that_attend_within_windows_keep_their_tokens() -> None:
    assert make_plan(Reduction("illava", ratio=0.5), QWEN2_5).steps == ((64, 7), (64, 15))
    assert make_plan(Reduction("tome", ratio=0.5), QWEN2_5).steps == ((32, 7), (32, 15), (32, 23), (32, 31))


def test_the_default_layers_are_the_same_plan_as_these_by_name() -> None:
    asked = {"method": "illava", "ratio": 0.5}
    left_out, named = (Reduction.parse(asked | layers) for layers in ({}, {"layers": [5, 6, 7, 8]}))
    assert left_out != named
    assert make_plan(left_out, CLIP) == make_plan(named, CLIP)


@pytest.mark.parametrize(
    ("geometry", "asked", "in_prompt"),
    [
        (CLIP, {}, True),
        (CLIP, {"positions": "renumber"}, True),
        (CLIP, {"positions": "keep"}, False),
        (CLIP, {"class_token": False}, False),
        (SIGLIP, {}, False),
        (QWEN2_5, {"positions": "keep"}, False),
    ],
    ids=lambda value: f"{value.tokens} tokens" if isinstance(value, VisionGeometry) else str(value),
)
def test_visionzips_class_token(geometry: VisionGeometry, asked: dict[str, Any], in_prompt: bool) -> None:
    """Kept tokens are as many either way."""
    plan = make_plan(Reduction.parse({"method": "visionzip", "keep_tokens": 64, **asked}), geometry)
    assert (plan.kept, plan.options) == (64, (in_prompt,))
    assert plan.steps == ((geometry.tokens - 64, geometry.layers - 1),)
    assert Plan.from_ints(plan.to_ints(), geometry) == plan


def test_what_does_not_come_out_even_goes_early() -> None:
    plan = make_plan(Reduction("tome", keep_tokens=576 - 50), CLIP)
    assert plan.folds == (3,) * 4 + (2,) * 19
    plan = make_plan(Reduction("tome", keep_tokens=574), CLIP)
    assert plan.steps == ((1, 0), (1, 1))  # a layer that removes nothing has no step


@given(st.sampled_from([CLIP, SIGLIP]), st.sampled_from(["square", "row"]))
def test_the_ratios_that_pooling_tells_work(geometry: VisionGeometry, window: str) -> None:
    with pytest.raises(InvalidReduction) as refusal:
        make_plan(Reduction.parse({"method": "pool", "ratio": 0.01, "window": window}), geometry)
    told = str(refusal.value).split("give ratio ")[1].split(" or ")
    for one in told:
        ratio, count = one.removesuffix(" tokens)").split(" (")
        assert make_plan(
            Reduction.parse({"method": "pool", "ratio": float(ratio), "window": window}), geometry
        ).kept == int(count)


@pytest.mark.parametrize("method", ["tome", "turbo"])
def test_the_limit_that_tome_tells_works(method: str) -> None:
    with pytest.raises(InvalidReduction) as refusal:
        make_plan(Reduction(method, ratio=0.99), CLIP)
    count = int(str(refusal.value).rsplit("or ", 1)[1].split()[0])
    assert make_plan(Reduction(method, keep_tokens=count), CLIP).kept == count
    with pytest.raises(InvalidReduction):
        make_plan(Reduction(method, keep_tokens=count - 1), CLIP)
