"""Images in tiles: the base tile alone, and methods that act on tiles before they are laid out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foldserve.reducers import METHODS
from foldserve.reducers.geometry import Stage, VisionGeometry
from foldserve.reducers.item import ItemPlan, Layout, Part, check_reduction, plan_item
from foldserve.reducers.plan import InvalidReduction, Reduction

TILE = VisionGeometry(81, (9, 9), 8, class_token=True, any_resolution=True)


@dataclass(frozen=True)
class Rows:
    """A base tile, and `shape[0]` tiles below each other with a newline per row of tokens; (0,) is a video's frame."""

    tile: VisionGeometry = TILE

    def layout(self, tiles: int) -> Layout:
        return self.of_squares((tiles,), 9)

    def base(self, shape: tuple[int, ...]) -> Layout | None:
        return Layout((Part(VisionGeometry(81, (9, 9)), separators=1),), shape, self) if shape[0] else None

    def of_squares(self, shape: tuple[int, ...], side: int) -> Layout:
        rows = shape[0] * side
        parts = Part(VisionGeometry(side**2), name="base"), Part(VisionGeometry(rows * side), 1, rows, "mosaic")
        return Layout(parts, shape, self)


tiles = st.integers(1, 9).map(Rows().layout)


@given(tiles, st.floats(0, 0.9), st.sampled_from([None, "withdraw", "fastv"]), st.sampled_from(["keep", "renumber"]))
def test_the_base_tile_alone_and_what_is_left_of_it(layout: Layout, ratio: float, decoder: Any, positions: Any) -> None:
    plan = plan_item(Reduction(first="base_only", ratio=ratio, decoder=decoder, positions=positions), layout)
    assert (plan.encoded, plan.kept) == (layout.tokens, 81 - int(81 * ratio) + 1)
    assert not plan.is_identity and plan.base_only and plan.keeps_positions == (positions == "keep")
    assert plan.method == ("base_only+folder" if int(81 * ratio) else "base_only")
    assert_read_back(plan, layout)


@given(tiles, st.sampled_from(["illava", "downsample"]), st.integers(2, 8))
def test_every_tile_is_a_smaller_square(layout: Layout, method: str, side: int) -> None:
    removed = 81 - side**2
    options: dict[str, Any] = {"layers": [0, 2]} if method == "illava" else {}
    plan = plan_item(Reduction.parse({"method": method, "ratio": removed / 81 + 1e-9, **options}), layout)
    assert plan.laid_out == Rows().of_squares(layout.shape, side)
    assert plan.kept == plan.laid_out.tokens == side**2 + layout.shape[0] * side * (side + 1)
    assert plan.method == method and plan.tile is not None and plan.tile.kept == side**2
    assert_read_back(plan, layout)


def assert_read_back(plan: ItemPlan, layout: Layout) -> None:
    ints = plan.to_ints()
    assert ItemPlan.from_ints(ints[len(layout.shape) :], layout) == plan
    assert len(ints) == len(plan_item(Reduction(), layout).to_ints())


def test_downsample_takes_the_largest_square_that_fits() -> None:
    plan = plan_item(Reduction("downsample", ratio=0.5), Rows().layout(2))
    assert plan.tile is not None and plan.tile.grid == (6, 6)  # of the 41 tokens that were left


IMAGE, VIDEO = Rows().layout(2), Rows().layout(0)
ONE_GRID = Layout.single(VisionGeometry(81, (9, 9), 8, class_token=True))
AFTER_TOWER = Layout(IMAGE.parts, (2,), Rows(VisionGeometry(81, stages=frozenset({Stage.AFTER_TOWER}))))
REFUSED: list[tuple[Layout, dict[str, Any], str, str]] = [
    (ONE_GRID, {"method": "base_only"}, "method", "this model.s are not"),
    (VIDEO, {"method": "base_only"}, "method", "videos have no base tile"),
    *((IMAGE, {"method": name, "ratio": 0.5}, "method", "leaves no grid") for name in ("folder_cls", "tome", "turbo")),
    (IMAGE, {"method": "illava", "ratio": 0.5, "layers": [0]}, "ratio", "give ratio 0.5556 \\(36 tokens of 81\\)"),
    (IMAGE, {"method": "illava", "keep_tokens": 36, "layers": [0]}, "keep_tokens", "same share of every tile"),
    (IMAGE, {"method": "downsample", "ratio": 0.5, "positions": "keep"}, "positions", "laid out anew"),
    (IMAGE, {"ratio": 0.99}, "ratio", "base: ratio 0.99 would remove 80 of 81"),
    (AFTER_TOWER, {"method": "downsample", "ratio": 0.5}, "method", "before tower, where"),
    (IMAGE, {"method": "stf", "ratio": 0.5}, "method", "projector"),
]


@pytest.mark.parametrize(("layout", "asked", "param", "told"), REFUSED, ids=[str(case[1]) for case in REFUSED])
def test_refused(layout: Layout, asked: dict[str, Any], param: str, told: str) -> None:
    with pytest.raises(InvalidReduction, match=told) as refusal:
        plan_item(Reduction.parse(asked), layout)
    assert refusal.value.param == param


def test_what_can_be_checked_before_an_image_is_known() -> None:
    check_reduction(Reduction(first="base_only"), IMAGE)
    check_reduction(Reduction("illava", options=(("layers", (0,)),), ratio=0.5), IMAGE)
    for reduction, layout in ((Reduction(first="base_only"), ONE_GRID), (Reduction("tome", ratio=0.5), IMAGE)):
        with pytest.raises(InvalidReduction):
            check_reduction(reduction, layout)


def test_an_image_that_is_its_base_tile_stays_whole() -> None:
    class OneTile(Rows):
        def of_squares(self, shape: tuple[int, ...], side: int) -> Layout:
            return Layout((Part(VisionGeometry(81), separators=1), Part(VisionGeometry(81), count=0)), shape, self)

    plan = plan_item(Reduction(first="base_only"), OneTile().layout(1))
    assert plan.is_identity and plan.method == "none" and plan.kept == 82


FORMS: list[tuple[dict[str, Any], Reduction]] = [
    ({"method": "base_only"}, Reduction(first="base_only")),
    ({"method": "base_only", "withdraw": True}, Reduction(first="base_only", decoder="withdraw")),
    (
        {"method": "base_only+fastv", "decoder_ratio": 0.3},
        Reduction(first="base_only", decoder="fastv", decoder_ratio=0.3),
    ),
    ({"method": "base_only+folder", "ratio": 0.5}, Reduction(first="base_only", ratio=0.5)),
    (
        {"method": "base_only+random+fastv", "keep_tokens": 9},
        Reduction("random", "fastv", keep_tokens=9, first="base_only"),
    ),
]


@pytest.mark.parametrize(("asked", "reduction"), FORMS, ids=[str(asked) for asked, _ in FORMS])
def test_ways_to_ask_for_the_base_tile(asked: dict[str, Any], reduction: Reduction) -> None:
    assert Reduction.parse(asked) == reduction
    assert Reduction.parse(reduction.to_json()) == reduction
    assert reduction.acts_before_decoder


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"method": "base_only", "ratio": 0.5}, "ratio"),
        ({"method": "base_only+fastv", "keep_tokens": 50}, "keep_tokens"),
        ({"method": "base_only", "scale": "official"}, "scale"),
        ({"method": "base_only+illava", "ratio": 0.5}, "method"),
        ({"method": "base_only+downsample", "ratio": 0.5}, "method"),
        ({"method": "base_only+base_only"}, "method"),
        ({"method": "folder+base_only"}, "method"),
        ({"method": "fastv+base_only"}, "method"),
    ],
    ids=str,
)
def test_what_does_not_go_with_it(asked: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidReduction, match="base_only") as refusal:
        Reduction.parse(asked)
    assert refusal.value.param == param


def test_it_is_no_method_of_a_grid() -> None:
    assert METHODS["base_only"].stage == Stage.BEFORE_TOWER
    with pytest.raises(InvalidReduction, match="goes into `first`"):
        Reduction("base_only")
