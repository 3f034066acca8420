"""Counts: from what was asked to integers, and their way to the model."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from foldserve.reducers import METHODS, Stage
from foldserve.reducers.plan import InvalidReduction, Plan, Reduction, VisionGeometry, fold_schedule, make_plan

METHODS_OF_ANY_COUNT = ("folder", "folder_cls")
methods = st.sampled_from(METHODS_OF_ANY_COUNT)


def clip(tokens: int) -> VisionGeometry:
    """A tower with a class token."""
    return VisionGeometry(tokens, layers=23, class_token=True)


@st.composite
def counts(draw: st.DrawFn) -> tuple[int, int]:
    """(tokens, tokens that may be removed)"""
    n = draw(st.integers(2, 3000))
    return n, draw(st.integers(0, n - 2))


@given(counts())
def test_folds_sum_up_and_stay_below_half(count: tuple[int, int]) -> None:
    n, r = count
    for k in fold_schedule(n, r):
        assert 1 <= k <= (n - 1) // 2
        n, r = n - k, r - k
    assert r == 0


@pytest.mark.parametrize(("n", "r"), [(7, 6), (2, 1), (1, 1), (0, 1), (7, -1)])
def test_schedule_refuses_what_cannot_be_folded(n: int, r: int) -> None:
    with pytest.raises(ValueError, match="can go"):
        fold_schedule(n, r)


@given(methods, st.integers(2, 3000), st.floats(0, 1, exclude_max=True))
def test_ratio_is_truncated(method: str, n: int, ratio: float) -> None:
    assume(int(n * ratio) <= n - 2)
    plan = make_plan(Reduction(method, ratio=ratio), clip(n))
    assert plan.removed == int(n * ratio) == sum(plan.folds)
    assert plan.kept == n - plan.removed
    assert plan.is_identity == (plan.removed == 0) == (plan.method == "none")


@given(methods, counts())
def test_equal_integers_are_equal_plans(method: str, count: tuple[int, int]) -> None:
    n, r = count
    by_count = make_plan(Reduction(method, keep_tokens=n - r), clip(n))
    ratio = (r + 0.5) / n  # not the same number, but the same count
    by_ratio = make_plan(Reduction(method, ratio=ratio), clip(n))
    assert by_count == by_ratio
    assert hash(by_count) == hash(by_ratio)


@given(methods, counts(), st.booleans(), st.integers(0, 2**32 - 1))
def test_plan_round_trip(method: str, count: tuple[int, int], official: bool, seed: int) -> None:
    n, r = count
    options = (("scale", "official"),) if official and method == "folder" else ()
    reduction = Reduction(method, keep_tokens=n - r, options=options)
    plan = make_plan(reduction, clip(n)).with_seed(seed)
    assert Plan.from_ints(list(plan.to_ints()), clip(n)) == plan
    assert len(plan.to_ints()) == len(Plan("none", 1).to_ints())
    assert plan.options == (() if plan.is_identity else reduction.option_values)


def test_all_options_of_a_method_in_one_integer() -> None:
    words = [("geometry", word) for word in ("plain", "centered", "standardized")]
    asked = [
        Reduction("divprune", options=(one, ("rest", rest)), ratio=0.5) for one in words for rest in ("drop", "merge")
    ]
    plans = [make_plan(reduction, clip(576)) for reduction in asked]
    assert [Plan.from_ints(plan.to_ints(), clip(576)) for plan in plans] == plans
    assert len({plan.to_ints() for plan in plans}) == 6
    assert all(prod(option.count for option in method.options) <= 1 << 63 for method in METHODS.values())


@pytest.mark.parametrize("method", METHODS_OF_ANY_COUNT)
def test_identity_is_the_same_for_all(method: str) -> None:
    for reduction in (Reduction(method), Reduction(method, ratio=0.001), Reduction(method, keep_tokens=576)):
        assert make_plan(reduction, clip(576)) == Plan("none", 576)


def test_class_token_takes_part_in_folder_cls_only() -> None:
    assert make_plan(Reduction("folder", ratio=0.5), clip(576)).folds == (287, 1)
    in_last_layer = make_plan(Reduction("folder_cls", ratio=0.5), clip(576))
    assert in_last_layer.folds == in_last_layer.removed_in(22) == (288,)
    assert in_last_layer.removed_in(21) == ()


@pytest.mark.parametrize(
    ("method", "geometry", "told"),
    [
        ("folder", VisionGeometry(576, stages=frozenset({Stage.DECODER})), "after tower"),
        ("folder_cls", VisionGeometry(576, stages=frozenset({Stage.AFTER_TOWER}), projector="stf"), "'stf'"),
        ("folder_cls", VisionGeometry(729), "class token"),
    ],
)
def test_model_that_a_method_does_not_work_with(method: str, geometry: VisionGeometry, told: str) -> None:
    with pytest.raises(InvalidReduction, match=told) as refusal:
        make_plan(Reduction(method, ratio=0.5), geometry)
    assert refusal.value.param == "method"
    assert f"{method!r}" in str(refusal.value)


@pytest.mark.parametrize(("amount", "param"), [({"ratio": 0.5}, "ratio"), ({"keep_tokens": 365}, "keep_tokens")])
def test_any_resolution_needs_squares(amount: dict[str, Any], param: str) -> None:
    tiles = VisionGeometry(729, any_resolution=True)
    with pytest.raises(InvalidReduction, match=r"give ratio 0.5049 \(361 tokens of 729\)") as refusal:
        make_plan(Reduction(**amount), tiles)
    assert refusal.value.param == param
    assert make_plan(Reduction(keep_tokens=361), tiles).kept == 361


def test_every_method_says_what_it_is() -> None:
    assert all(
        method.name == name and method.summary and method.stage and method.kind for name, method in METHODS.items()
    )


@pytest.mark.parametrize(
    ("reduction", "n", "param", "told"),
    [
        (Reduction(ratio=0.9), 7, "ratio", "below 0.8571"),
        (Reduction(ratio=0.9999), 576, "ratio", "below 0.9982"),
        (Reduction(ratio=0.5), 2, "ratio", "below 0.5"),
        (Reduction("folder_cls", ratio=0.999), 576, "ratio", "remove 575 of 576"),
        (Reduction(keep_tokens=577), 576, "keep_tokens", "give 576 or less"),
        (Reduction(keep_tokens=2), 1, "keep_tokens", "give 1 or less"),
    ],
)
def test_too_much(reduction: Reduction, n: int, param: str, told: str) -> None:
    with pytest.raises(InvalidReduction, match=told) as refusal:
        make_plan(reduction, clip(n))
    assert refusal.value.param == param


@given(st.integers(3, 3000))
def test_the_limit_that_is_told_works(n: int) -> None:
    with pytest.raises(InvalidReduction) as refusal:
        make_plan(Reduction(ratio=1 - 2**-53), clip(n))
    limit = float(str(refusal.value).split("below ")[1].split(",")[0])
    assert make_plan(Reduction(ratio=limit - 1e-9), clip(n)).kept >= 2
    assert make_plan(Reduction(keep_tokens=2), clip(n)).kept == 2
