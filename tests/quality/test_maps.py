"""`foldserve map`: its options, and the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from foldserve.reducers.reduction import InvalidReduction, Reduction
from foldserve.server.quality.maps.drawing import MapGrid, draw
from foldserve.server.quality.maps.options import MapOptions

GREY = (150, 150, 150)
WHOLE = (0.0, 0.0, 1.0, 1.0)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ({}, {"ratio": 0.66}),
        ({"method": "tome"}, {"method": "tome", "ratio": 0.66}),
        ({"ratio": 0.5}, {"ratio": 0.5}),
        ({"keep_tokens": 9, "method": "random"}, {"method": "random", "keep_tokens": 9}),
        ({"method": "base_only"}, {"method": "base_only"}),
        ({"reduction": Reduction.parse({"ratio": 0.3})}, {"ratio": 0.3}),
    ],
    ids=str,
)
def test_what_is_asked(image: Path, given: dict[str, Any], asked: dict[str, Any]) -> None:
    assert MapOptions(image, **given).requested_reduction == Reduction.parse(asked)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"reduction": Reduction(), "ratio": 0.5}, "--reduction says all"),
        ({"ratio": 2.0}, "ratio"),
        ({"method": "nothing"}, "unknown method"),
        ({"output": Path(__file__).parent}, "is no file"),
    ],
    ids=str,
)
def test_what_is_refused(image: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, InvalidReduction), match=message):
        MapOptions(image, **given)


def test_an_image_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="is no file"):
        MapOptions(Path("nowhere.png"))


def picture(group: list[int], sizes: list[int], box: tuple[float, float, float, float] = WHOLE) -> Any:
    """Colours in the middle of the four tokens of a grey image."""
    found = draw(Image.new("RGB", (100, 100), GREY), [MapGrid("", 2, 2, box, group, sizes)], "title")
    side = 960
    return [found.getpixel((16 + x * side // 4, 16 + y * side // 4)) for y in (1, 3) for x in (1, 3)]


def test_merged_tokens_share_a_colour_and_others_have_their_own() -> None:
    first, second, third, fourth = picture([0, 0, 1, 2], [2, 1, 1])
    assert first == second != GREY
    assert third == fourth == GREY


def test_dropped_tokens_are_dim() -> None:
    kept, dropped, *_ = picture([0, -1, 1, -1], [1, 1])
    assert kept == GREY
    assert max(dropped) < GREY[0] / 2


def test_what_no_grid_shows_is_dim() -> None:
    first, second, *_ = picture([0, 1, 2, 3], [1, 1, 1, 1], (0.0, 0.0, 0.6, 0.6))
    assert max(second) < GREY[0] / 2 < max(first)


def test_groups_have_borders_and_tokens_of_one_group_none() -> None:
    found = draw(Image.new("RGB", (100, 100), GREY), [MapGrid("", 2, 2, WHOLE, [0, 0, 1, 2], [2, 1, 1])], "title")
    between_alone, in_one_group = found.getpixel((16 + 480, 16 + 720)), found.getpixel((16 + 480, 16 + 240))
    assert between_alone == (0, 0, 0)
    assert in_one_group == found.getpixel((16 + 240, 16 + 240))


def test_tiles_share_a_panel_beside_the_whole_image() -> None:
    grids = [MapGrid("base", 2, 2, WHOLE, [0, 1, 2, 3], [1] * 4)]
    one = draw(Image.new("RGB", (100, 100), GREY), grids, "title")
    grids += [MapGrid(f"tile {i}", 2, 2, (i / 2, 0, i / 2 + 0.5, 1), [0, 1, 2, 3], [1] * 4) for i in (0, 1)]
    two = draw(Image.new("RGB", (100, 100), GREY), grids, "title")
    assert two.width > two.height and one.width < one.height
