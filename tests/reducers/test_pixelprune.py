"""PixelPrune's rule against its naive form, its invariant, and what a plan makes of the cells that stay."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foldserve.reducers.item import ItemPlan, Layout, Part, min_kept_cells, plan_item
from foldserve.reducers.pixelprune import Cells, PixelPrune, Prediction, predict, unpredicted
from foldserve.reducers.plan import InvalidReduction, Reduction, VisionGeometry
from tests.reducers.check import few
from tests.reducers.naive import naive_pixelprune

PREDICTIONS: tuple[Prediction, Prediction] = ("anchored", "sliding")
LAYOUT = Layout.single(VisionGeometry(144, (12, 12), 3, class_token=True, takes_cells=True))


def draw(seed: int, rows: int, columns: int, levels: int, values: int = 3) -> Tensor:
    """Few levels, so that many cells are alike."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(100, 100 + levels, (rows, columns, values), dtype=torch.uint8, generator=generator)


grids = st.builds(draw, st.integers(0, 2**31), st.integers(1, 7), st.integers(1, 7), st.integers(1, 9))
taus = st.integers(0, 9)


def places(stays: Tensor) -> list[int]:
    return stays.flatten().nonzero().flatten().tolist()


@given(grids, taus, st.sampled_from(PREDICTIONS))
def test_is_the_naive_form(cells: Tensor, tau: int, prediction: Prediction) -> None:
    stays = predict(cells, tau, prediction).stays
    assert places(stays) == naive_pixelprune(cells.tolist(), tau, anchored=prediction == "anchored")


@given(grids, taus)
def test_what_a_decoder_shows_is_never_further_than_tau(cells: Tensor, tau: int) -> None:
    """It knows the pixels of the cells that stay alone."""
    stays = predict(cells, tau).stays
    whole, (rows, columns) = cells.int(), cells.shape[:2]
    shown = whole.clone()
    for i in range(rows):
        for j in range(columns):
            if stays[i, j]:
                continue
            left, upper = shown[i, j - 1], shown[i - 1, j]
            corner = shown[i - 1, j - 1]
            by_upper = j == 0 or (i > 0 and (corner - left).abs().max() <= tau and (corner - upper).abs().max() > tau)
            shown[i, j] = upper if by_upper else left
    assert (shown - whole).abs().max() <= tau


def test_errors_creep_where_cells_are_compared_with_their_neighbours() -> None:
    """The difference between both predictions: a gradient of one level a cell."""
    gradient = torch.arange(9, dtype=torch.uint8).view(1, 9, 1)
    assert places(predict(gradient, 1, "sliding").stays) == [0]
    assert places(predict(gradient, 1, "anchored").stays) == [0, 2, 4, 6, 8]
    assert (unpredicted(gradient, 1), unpredicted(gradient, 0)) == (1, 9)


@given(grids, taus)
def test_cells_that_are_not_predicted_are_counted(cells: Tensor, levels: int) -> None:
    assert unpredicted(cells, levels) == len(naive_pixelprune(cells.tolist(), levels, anchored=False))


def test_large_differences_do_not_wrap_around() -> None:
    cells = torch.tensor([[[0], [255], [0], [129]]], dtype=torch.uint8)
    assert places(predict(cells, 127).stays) == [0, 1, 2, 3]


@few
@given(grids, taus, st.sampled_from(PREDICTIONS), st.integers(2, 60))
def test_at_least_so_many_stay(cells: Tensor, tau: int, prediction: Prediction, least: int) -> None:
    """Those that the rule leaves among them; the others differ least from their prediction."""
    total = cells.shape[0] * cells.shape[1]
    least = min(least, total)
    stays, difference = predict(cells, tau, prediction)
    chosen = PixelPrune(tau, prediction).choose(cells, least)
    kept = list(range(total)) if chosen is None else chosen.places().tolist()
    assert len(kept) == max(least, int(stays.sum()))
    assert set(places(stays)) <= set(kept)
    gone = [i for i in range(total) if i not in kept]
    added = [i for i in kept if not stays.flatten()[i]]
    apart = difference.flatten().tolist()
    assert all((apart[i], i) > (apart[j], j) for i in added for j in gone)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("tau", [0, 255])
def test_one_colour_leaves_the_first_and_the_last_cell(tau: int, prediction: Prediction) -> None:
    chosen = PixelPrune(tau, prediction).choose(torch.full((5, 3, 2), 7, dtype=torch.uint8), 2)
    assert chosen is not None and chosen.places().tolist() == [0, 14]


def test_all_stay() -> None:
    assert PixelPrune().choose(draw(0, 4, 4, 156), 2) is None


@given(st.lists(st.booleans(), min_size=1, max_size=200))
def test_a_mask_comes_back(stays: list[bool]) -> None:
    cells = Cells.of(torch.tensor(stays).view(1, -1))
    assert Cells.from_ints(cells.to_ints()) == cells
    assert cells.places().tolist() == [i for i, stay in enumerate(stays) if stay] and cells.kept == sum(stays)


def some(kept: int) -> Cells:
    stays = torch.zeros(12, 12, dtype=torch.bool)
    stays.view(-1)[:kept] = True
    return Cells.of(stays)


PLANNED: list[tuple[dict[str, object], int, int, str]] = [
    ({"method": "pixelprune"}, 50, 50, "pixelprune"),
    ({"method": "pixelprune", "ratio": 0.9}, 50, 50, "pixelprune"),
    ({"method": "pixelprune+folder"}, 50, 50, "pixelprune"),
    ({"method": "pixelprune+folder", "ratio": 0.75}, 50, 36, "pixelprune+folder"),
    ({"method": "pixelprune+folder", "ratio": 0.75}, 30, 30, "pixelprune"),
    ({"method": "pixelprune+random", "keep_tokens": 40}, 50, 40, "pixelprune+random"),
    ({"method": "pixelprune+random", "keep_tokens": 40}, 20, 20, "pixelprune"),
    ({"method": "pixelprune+folder", "scale": "official", "tau": 3, "ratio": 0.9}, 50, 15, "pixelprune+folder"),
]


@pytest.mark.parametrize(("asked", "cells", "kept", "method"), PLANNED, ids=str)
def test_plans(asked: dict[str, object], cells: int, kept: int, method: str) -> None:
    reduction = Reduction.parse({**asked, "positions": "keep", "withdraw": True})
    assert Reduction.parse(reduction.to_json()) == reduction
    plan = plan_item(reduction, LAYOUT, some(cells))
    assert (plan.encoded, plan.kept, plan.removed, plan.method) == (144, kept, 144 - kept, method)
    assert plan.keeps_positions and plan.decoder_removed == kept and not plan.is_identity
    assert ItemPlan.from_ints(plan.to_ints(), LAYOUT) == plan
    assert plan != plan_item(reduction, LAYOUT, some(cells - 1))


@pytest.mark.parametrize(
    ("asked", "least"),
    [
        ({"method": "pixelprune"}, 2),
        ({"method": "pixelprune", "ratio": 0.75}, 36),
        ({"method": "pixelprune", "keep_tokens": 144}, 144),
        ({"method": "pixelprune+folder", "ratio": 0.75}, 2),
    ],
    ids=str,
)
def test_an_amount_is_a_bound_of_the_rule_alone(asked: dict[str, object], least: int) -> None:
    assert min_kept_cells(Reduction.parse(asked), LAYOUT) == least


@pytest.mark.parametrize("method", ["pixelprune", "pixelprune+folder"])
def test_ratio_0_removes_nothing(method: str) -> None:
    assert Reduction.parse({"method": method, "ratio": 0, "tau": 9}) == Reduction()


def test_where_the_rule_leaves_all_it_is_as_if_nothing_was_asked() -> None:
    assert plan_item(Reduction("pixelprune", positions="keep"), LAYOUT) == plan_item(Reduction(), LAYOUT)
    both = Reduction.parse({"method": "pixelprune+folder", "ratio": 0.5, "tau": 3})
    assert plan_item(both, LAYOUT) == plan_item(Reduction(ratio=0.5), LAYOUT)


NO_CELLS = Layout.single(VisionGeometry(144, (12, 12), 3))
FRAMES = Layout((Part(VisionGeometry(4, (2, 2), takes_cells=True), 3),))
REFUSED: list[tuple[dict[str, object], Layout, str, str]] = [
    ({"method": "pixelprune"}, NO_CELLS, "method", "can see some cells of one image"),
    ({"method": "pixelprune+folder"}, NO_CELLS, "method", "can see some cells of one image"),
    ({"method": "pixelprune"}, Layout((Part(VisionGeometry(4, (2, 2)), 3),)), "method", "can see some cells"),
    ({"method": "pixelprune"}, FRAMES, "method", "needs an image that is one grid of tokens"),
    ({"method": "pixelprune+pool", "ratio": 0.75}, LAYOUT, "method", "needs a grid of vision tokens"),
    ({"method": "pixelprune+tome", "ratio": 0.75}, LAYOUT, "method", "can't be combined"),
    ({"method": "pixelprune+downsample"}, LAYOUT, "method", "can't be combined"),
    ({"method": "pixelprune+base_only"}, LAYOUT, "method", "can't be combined"),
    ({"method": "folder+pixelprune"}, LAYOUT, "method", "can't be combined"),
    ({"method": "pixelprune", "keep_tokens": 145}, LAYOUT, "keep_tokens", "more than this image has"),
    ({"method": "pixelprune", "ratio": 0.999}, LAYOUT, "ratio", "2 have to stay"),
    ({"method": "pixelprune", "scale": "official"}, LAYOUT, "scale", "'pixelprune' takes no scale"),
    ({"method": "folder", "tau": 3}, LAYOUT, "tau", "'folder' takes no tau"),
    ({"method": "pixelprune", "tau": 256}, LAYOUT, "tau", "tau must be an integer of 0 to 255, not 256"),
    ({"method": "pixelprune", "tau": 1.0}, LAYOUT, "tau", "tau must be an integer of 0 to 255"),
]


@pytest.mark.parametrize(
    ("asked", "layout", "param", "message"), REFUSED, ids=lambda value: "" if isinstance(value, Layout) else str(value)
)
def test_refused(asked: dict[str, object], layout: Layout, param: str, message: str) -> None:
    with pytest.raises(InvalidReduction, match=message) as refusal:
        reduction = Reduction.parse(asked)
        min_kept_cells(reduction, layout)
        plan_item(reduction, layout)
    assert refusal.value.param == param


@pytest.mark.parametrize("method", ["pixelprune", "pixelprune+folder"])
def test_a_server_by_default_removes_more_at_low_detail(method: str) -> None:
    """The amount of the rule alone would be a lower bound."""
    default = Reduction.parse({"method": method, "tau": 2})
    low = Reduction.parse({"method": "pixelprune+folder", "tau": 2, "ratio": 0.75})
    assert default.with_ratio(0.75) == low
