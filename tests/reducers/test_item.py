"""Plans of images that are several grids: what each is asked, what they add up to, and their way in integers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foldserve.reducers.fastv import FastV
from foldserve.reducers.geometry import VisionGeometry
from foldserve.reducers.item import ItemPlan, Layout, Part, plan_item
from foldserve.reducers.plan import InvalidReduction, Reduction, make_plan

parts = st.builds(Part, st.builds(VisionGeometry, st.integers(2, 700)), st.integers(1, 13), st.integers(0, 60))
layouts = st.builds(
    Layout, st.lists(parts, min_size=1, max_size=3).map(tuple), st.lists(st.integers(0, 9999), max_size=2).map(tuple)
)


@given(layouts, st.floats(0, 1, exclude_max=True))
def test_a_ratio_holds_for_each_grid(layout: Layout, ratio: float) -> None:
    reduction = Reduction(ratio=ratio)
    try:
        plan = plan_item(reduction, layout)
    except InvalidReduction as refusal:
        assert refusal.param == "ratio"
        assert any(part.geometry.tokens - int(part.geometry.tokens * ratio) < 2 for part in layout.parts)
        return
    assert plan.grids == tuple(make_plan(reduction, part.geometry) for part in layout.parts)
    left = [p.count * (p.geometry.tokens - int(p.geometry.tokens * ratio)) + p.separators for p in layout.parts]
    assert (plan.kept, plan.encoded, plan.removed) == (sum(left), layout.tokens, layout.tokens - sum(left))
    assert plan.ratio == plan.removed / layout.tokens
    assert plan.is_identity == (plan.removed == 0) == (plan.method == "none")


@given(layouts, st.data())
def test_kept_tokens_are_shared_out_in_proportion(layout: Layout, data: st.DataObject) -> None:
    asked = data.draw(st.integers(2, layout.tokens + 2))
    least = layout.tokens - layout.removable
    try:
        plan = plan_item(Reduction(keep_tokens=asked), layout)
    except InvalidReduction as refusal:
        assert refusal.param == "keep_tokens" and not least <= asked <= layout.tokens
        return
    assert least <= plan.kept <= asked <= layout.tokens
    assert asked - plan.kept < sum(part.count for part in layout.parts), "another token in every grid would not fit"
    if all(part.count == 1 for part in layout.parts):
        assert plan.kept == asked
    for grid, part in zip(plan.grids, layout.parts, strict=True):
        share = (asked - least) * (part.geometry.tokens - 2) / max(layout.removable, 1)
        assert abs(grid.kept - 2 - share) < 1


def test_nothing_is_removed_where_all_is_to_stay() -> None:
    layout = Layout((Part(VisionGeometry(256), 12), Part(VisionGeometry(100), separators=10)))
    assert plan_item(Reduction(keep_tokens=layout.tokens), layout).is_identity


@pytest.mark.parametrize(
    ("asked", "told"), [(15, "give 16 to 630"), (631, "give 16 to 630")], ids=["too few", "too many"]
)
def test_the_limits_that_are_told(asked: int, told: str) -> None:
    layout = Layout((Part(VisionGeometry(100), 6), Part(VisionGeometry(20), separators=10 - 8)), (1, 2))
    assert (layout.tokens, layout.tokens - layout.removable) == (622, 16)
    layout = Layout((*layout.parts[:1], Part(VisionGeometry(28), separators=2)))
    with pytest.raises(InvalidReduction, match=told) as refusal:
        plan_item(Reduction(keep_tokens=asked), layout)
    assert refusal.value.param == "keep_tokens"
    assert plan_item(Reduction(keep_tokens=16), layout).kept == 16


@given(
    layouts,
    st.sampled_from([{}, {"withdraw": True}, {"method": "folder+fastv"}, {"method": "random"}]),
    st.sampled_from(["keep", "renumber"]),
    st.integers(0, 2**32 - 1),
)
def test_integers_are_read_back(layout: Layout, fields: dict[str, Any], positions: str, seed: int) -> None:
    plan = plan_item(Reduction.parse({"ratio": 0.1, "positions": positions, **fields}), layout)
    if plan.is_seeded:
        plan = plan.with_seed(seed)
    ints = plan.to_ints()
    assert ints[: len(layout.shape)] == layout.shape
    assert ItemPlan.from_ints(list(ints[len(layout.shape) :]), layout) == plan
    assert len(ints) == len(plan_item(Reduction(), layout).to_ints())
    assert plan.keeps_positions == (positions == "keep" and not plan.is_identity)


@given(layouts, st.sampled_from([None, "withdraw", "fastv"]))
def test_the_decoder_counts_the_whole_image(layout: Layout, decoder: str | None) -> None:
    """Separators leave too."""
    plan = plan_item(Reduction(ratio=0.25, decoder=decoder) if layout.removable else Reduction(decoder=decoder), layout)
    gone = {None: 0, "withdraw": plan.kept, "fastv": FastV().removed(plan.kept, 0.5)}[decoder]
    assert (plan.decoder, plan.decoder_removed) == (decoder or "none", gone)
    assert plan.kept_deep == plan.kept - gone
