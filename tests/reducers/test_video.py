"""Methods that choose among the tokens of a whole video: EVS and VidCom2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foldserve.reducers import METHODS, fold
from foldserve.reducers.geometry import VisionGeometry
from foldserve.reducers.item import ItemPlan, Layout, Part, check_reduction, plan_item
from foldserve.reducers.method import AcrossFrames
from foldserve.reducers.plan import InvalidReduction, Plan, Reduction, make_plan
from foldserve.reducers.vidcom2 import budgets, likeness
from tests.reducers.check import assert_fp32_inside, assert_nothing_read, assert_same_bits_alone, draw, few
from tests.reducers.naive import ACROSS_FRAMES

names = st.sampled_from(sorted(ACROSS_FRAMES))


@st.composite
def plans(draw_: st.DrawFn) -> Plan:
    """For a video of a few tokens and frames; a number of tokens that the method can keep."""
    name, frames, n = draw_(names), draw_(st.integers(1, 6)), draw_(st.integers(2, 12))
    geometry = VisionGeometry(frames * n, frames=frames)
    least = {"evs": n, "vidcom2": max(2, frames)}[name]
    return make_plan(Reduction(name, keep_tokens=draw_(st.integers(least, frames * n))), geometry)


def reduce(plan: Plan, x: Tensor) -> fold.Reduced:
    assert isinstance(plan.reducer, AcrossFrames)
    return plan.reducer.reduce(x, plan)


def test_every_method_across_frames_is_tried() -> None:
    assert set(ACROSS_FRAMES) == {name for name, method in METHODS.items() if isinstance(method, AcrossFrames)}


@few
@given(plans(), st.integers(1, 3), st.integers(4, 24), st.integers(0, 2**31))  # of 1 or 2 columns cosines are equal
def test_like_the_slow_version(plan: Plan, videos: int, width: int, seed: int) -> None:
    if plan.is_identity:
        return
    (x,) = draw(seed, (videos, plan.encoded, width), dtype=torch.float64)
    reduced = reduce(plan, x)
    expected = [ACROSS_FRAMES[plan.method](video, plan.frames, plan.kept) for video in x]
    assert reduced.source.tolist() == expected
    assert torch.equal(reduced.tokens, x.gather(1, reduced.source.unsqueeze(-1).expand(-1, -1, width)))
    assert (reduced.sizes == 1).all()
    assert (reduced.group >= 0).sum(dim=1).tolist() == [plan.kept] * videos
    assert_nothing_read(lambda x: reduce(plan, x), x)
    assert_fp32_inside(lambda x: reduce(plan, x), x)


@few
@given(plans(), st.integers(0, 2**31))
def test_the_same_bits_alone_and_in_parts(plan: Plan, seed: int) -> None:
    if plan.is_identity:
        return
    (x,) = draw(seed, (3, plan.encoded, 520))
    assert_same_bits_alone(lambda x: reduce(plan, x), x)
    whole = reduce(plan, x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fold, "AT_ONCE", 1)
        assert torch.equal(reduce(plan, x).source, whole.source)


@given(plans(), st.sampled_from(["constant", "all zero", "one frame repeated", "few different"]), st.integers(0, 2**31))
def test_equal_tokens_leave_an_exact_number_of_places(plan: Plan, kind: str, seed: int) -> None:
    if plan.is_identity:
        return
    n = plan.encoded // plan.frames
    (x,) = draw(seed, (2, plan.encoded, 6))
    if kind == "constant":
        x = x[:, :1].expand_as(x).contiguous()
    elif kind == "all zero":
        x = torch.zeros_like(x)
    elif kind == "one frame repeated":
        x = x[:, :n].repeat(1, plan.frames, 1)
    else:
        x = x[:, torch.randint(3, (plan.encoded,), generator=torch.Generator().manual_seed(seed)).clamp_max(n - 1)]
    source = reduce(plan, x).source
    assert source.shape == (2, plan.kept)
    assert (source.diff(dim=1) > 0).all() and source.min() >= 0 and source.max() < plan.encoded
    if plan.method == "evs":
        assert source[:, :n].tolist() == [list(range(n))] * 2
    if plan.method == "evs" and kind == "constant":
        assert source.tolist() == [list(range(plan.kept))] * 2  # nothing changes: the earlier ones


def test_evs_looks_one_frame_back() -> None:
    """A token that is new stays once, not for as long as it is there, nor does the first frame count as the past."""
    x = torch.tensor([[1.0, 0.0]]).repeat(8, 1)  # four frames of two tokens
    x[5], x[7] = torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])
    plan = make_plan(Reduction("evs", keep_tokens=3), VisionGeometry(8, frames=4))
    assert reduce(plan, x[None]).source.tolist() == [[0, 1, 5]]


def test_vidcom2_gives_a_frame_that_is_unlike_the_others_more() -> None:
    (x,) = draw(1, (1, 4 * 16, 32))
    x[:, :48] = x[:, :1] + 0.01 * x[:, :48]  # the last frame alone is varied
    to_video, _ = likeness(x, 4)
    found = budgets(to_video, 0.25)[0].tolist()
    assert found[3] > max(found[:3]) and all(found)


GEOMETRY = VisionGeometry(100)
FILM = Layout((Part(GEOMETRY, 4, separators=1, can_join=True),), (4,))


@given(st.integers(1, 9), st.integers(2, 99), st.integers(0, 9), names, st.floats(0, 1, exclude_max=True))
def test_a_ratio_holds_for_the_whole_video(frames: int, n: int, separators: int, name: str, ratio: float) -> None:
    layout = Layout((Part(VisionGeometry(n), frames, separators, can_join=True),), (frames,))
    try:
        plan = plan_item(Reduction(name, ratio=ratio), layout)
    except InvalidReduction as refusal:
        least = {"evs": n, "vidcom2": max(2, frames)}[name]
        assert refusal.param == "ratio" and frames * n - int(frames * n * ratio) < least
        return
    assert plan.kept == frames * n - int(frames * n * ratio) + separators
    assert ItemPlan.from_ints(plan.to_ints()[1:], layout) == plan
    assert len(plan.to_ints()) == len(plan_item(Reduction(), layout).to_ints())
    assert plan.is_identity == (plan.method == "none") == (plan.laid_out == layout)
    if not plan.is_identity:
        (part,) = plan.laid_out.parts
        assert (part.count, part.separators, part.geometry.frames) == (1, separators, frames)


@pytest.mark.parametrize("name", sorted(ACROSS_FRAMES))
def test_tokens_to_keep_are_those_of_the_whole_video(name: str) -> None:
    plan = plan_item(Reduction(name, keep_tokens=251), FILM)
    assert (plan.kept, plan.grids[0].kept, plan.method) == (251, 250, name)
    assert plan_item(Reduction(name, keep_tokens=401), FILM).is_identity
    with pytest.raises(InvalidReduction, match="give 3 to 401"):
        plan_item(Reduction(name, keep_tokens=402), FILM)


@pytest.mark.parametrize(
    ("asked", "param", "told"),
    [
        (
            {"method": "evs", "ratio": 0.8},
            "ratio",
            "the first frame of a video, 100 of 400 .* not 80: .* at most 0.75$",
        ),
        ({"method": "evs", "keep_tokens": 100}, "keep_tokens", "the first frame of a video, 100 of 400 .* not 99"),
        (
            {"method": "vidcom2", "ratio": 0.994},
            "ratio",
            "a token for each frame of a video, 4 of 400 .* at most 0.99$",
        ),
        ({"method": "evs", "ratio": 0.999}, "ratio", "have to stay"),
    ],
    ids=str,
)
def test_too_few_tokens(asked: dict[str, Any], param: str, told: str) -> None:
    with pytest.raises(InvalidReduction, match=told) as refusal:
        plan_item(Reduction.parse(asked), FILM)
    assert refusal.value.param == param


@given(st.integers(3, 400), st.integers(3, 2000), names)
def test_the_ratio_that_is_told_works(frames: int, n: int, name: str) -> None:
    layout = Layout((Part(VisionGeometry(n), frames, can_join=True),))
    with pytest.raises(InvalidReduction) as refusal:
        plan_item(Reduction(name, keep_tokens=2), layout)
    told = float(str(refusal.value).rsplit(" ", 1)[1])
    beyond = plan_item(Reduction(name, ratio=told), layout).kept - {"evs": n, "vidcom2": frames}[name]
    assert 0 <= beyond <= 1e-4 * layout.tokens + 1


@pytest.mark.parametrize("name", sorted(ACROSS_FRAMES))
def test_images_and_frames_that_lie_apart(name: str) -> None:
    """Whatever the amount."""
    for layout in (Layout.single(GEOMETRY), Layout((Part(GEOMETRY, 4),))):
        for amount in ({}, {"ratio": 0.25}, {"keep_tokens": 90}):
            with pytest.raises(InvalidReduction, match="compares the frames of a video") as refusal:
                plan_item(Reduction.parse({"method": name, **amount}), layout)
            assert refusal.value.param == "method"
        with pytest.raises(InvalidReduction, match="compares the frames"):
            check_reduction(Reduction(name, ratio=0.5), layout)
    check_reduction(Reduction(name, ratio=0.5), FILM)


def test_plans_of_other_numbers_of_frames_are_others() -> None:
    """Videos of as many tokens don't share a batch then."""
    few_, many = (
        plan_item(Reduction("vidcom2", ratio=0.5), Layout((Part(VisionGeometry(100 // count), count, can_join=True),)))
        for count in (4, 10)
    )
    assert few_.kept == many.kept == 50 and few_.grids != many.grids


@pytest.mark.parametrize("decoder", ["withdraw", "fastv"])
def test_the_decoder_goes_on_from_what_is_kept(decoder: str) -> None:
    plan = plan_item(Reduction("evs", decoder, ratio=0.5), FILM)
    assert (plan.kept, plan.kept_deep) == (201, 0 if decoder == "withdraw" else 201 - plan.decoder_removed)
    assert plan.decoder_removed
