"""The part of an image that each grid of tokens shows, for maps of where tokens went."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

from foldserve.reducers.geometry import VisionGeometry
from foldserve.reducers.plan import InvalidReduction, Plan

Box: TypeAlias = tuple[float, float, float, float]
"""(left, top, right, bottom) as shares of an image's width and height; outside [0, 1] if a grid covers padding."""

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


class Region(NamedTuple):
    """An unreduced grid of tokens in raster order.

    Attributes:
        name: "base", "tile 1", "frame 1", or "" for an image of one grid.
        plan: None if the grid is not encoded.
        window: rows and columns that stay of a tile's reduced square after padding is cut off; None: all.
    """

    name: str
    rows: int
    columns: int
    box: Box
    plan: Plan | None
    window: tuple[range, range] | None = None


def sides(geometry: VisionGeometry) -> tuple[int, int]:
    """(rows, columns) of a grid; raises InvalidReduction if the tokens are not a grid."""
    if geometry.grid is None:
        raise InvalidReduction("this model's vision tokens are no grid, so that no map of them can be drawn", "")
    return geometry.grid


def visible_box(image_processor: Any, size: tuple[int, int]) -> Box:
    """The part of an image of (width, height) pixels that a processor with a fixed output size keeps."""
    width, height = size
    if getattr(image_processor, "do_pad", False):  # to a square
        side = max(width, height)
        return _centred(side / width, side / height)
    crop: Mapping[str, int] | None = getattr(image_processor, "crop_size", None)
    resized: Mapping[str, int] = image_processor.size
    if not getattr(image_processor, "do_center_crop", False) or not crop:
        return WHOLE
    if shortest := resized.get("shortest_edge"):
        scale = shortest / min(width, height)
        return _centred(crop["width"] / (width * scale), crop["height"] / (height * scale))
    return _centred(crop["width"] / resized["width"], crop["height"] / resized["height"])


def _centred(width: float, height: float) -> Box:
    return (1 - width) / 2, (1 - height) / 2, (1 + width) / 2, (1 + height) / 2


def split_box(box: Box, down: int, across: int) -> Iterator[Box]:
    """Equal pieces of a box, in raster order."""
    left, top, right, bottom = box
    width, height = (right - left) / across, (bottom - top) / down
    for row in range(down):
        for column in range(across):
            x, y = left + column * width, top + row * height
            yield x, y, x + width, y + height


def tile_grid(size: tuple[int, int], count: int) -> tuple[int, int]:
    """(down, across) of `count` tiles: the grid whose aspect ratio is nearest to the image's."""
    grids = [(down, count // down) for down in range(1, count + 1) if count % down == 0]
    return min(grids, key=lambda grid: abs(grid[1] / grid[0] - size[0] / size[1]))
