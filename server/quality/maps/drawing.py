"""Draws a token map over its image: tokens of one group share a colour and an outline, dropped tokens are dark."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from PIL import Image, ImageDraw, ImageEnhance, ImageFont

Colour: TypeAlias = tuple[int, int, int]

_LONG_SIDE = 960
_MARGIN, _LINE = 16, 24
_BACKGROUND, _TEXT, _FAINT = (18, 18, 20), (240, 240, 240), (160, 160, 165)
_ALONE, _BETWEEN = (255, 255, 255), (0, 0, 0, 255)
_GOLDEN = 0.618034
_REST = 0.3
"""A group that holds more than this share of a grid is drawn grey: in a colour it would hide the others."""


@dataclass(frozen=True, slots=True)
class MapGrid:
    """One grid of a token map, as `POST /v1/reductions/map` describes it."""

    name: str
    rows: int
    columns: int
    box: tuple[float, float, float, float]
    group: Sequence[int]
    sizes: Sequence[int]

    def count(self) -> tuple[int, int, int]:
        """Numbers of merged groups, of tokens kept alone, and of dropped tokens."""
        merged = sum(size > 1 for size in self.sizes)
        return merged, len(self.sizes) - merged, sum(group < 0 for group in self.group)


def draw(image: Image.Image, grids: Sequence[MapGrid], title: str) -> Image.Image:
    """One panel for the whole image, one for all its tiles, and below them title and legend."""
    panels = _panels(grids)
    scale = max(1.0, _LONG_SIDE / len(panels) ** 0.5 / max(image.size))
    width, height = round(image.width * scale), round(image.height * scale)
    large = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    down = 1 if width <= 1.2 * height or len(panels) == 1 else len(panels)
    across = -(-len(panels) // down)
    size = (across * (width + _MARGIN) + _MARGIN, down * (height + _LINE + _MARGIN) + 3 * _LINE + _MARGIN)
    page = Image.new("RGB", size, _BACKGROUND)
    pen = ImageDraw.Draw(page)
    for i, panel in enumerate(panels):
        x, y = _MARGIN + i % across * (width + _MARGIN), _MARGIN + i // across * (height + _LINE + _MARGIN)
        page.paste(_panel(large, panel), (x, y))
        pen.text((x, y + height + 4), _caption(panel), _FAINT, font=_font(14))
    base = page.height - 3 * _LINE - _MARGIN // 2
    pen.text((_MARGIN, base), title, _TEXT, font=_font(18))
    legend = "one colour: merged into one token   white outline: a token of its own   dark: dropped, or not seen"
    pen.text((_MARGIN, base + _LINE + 8), legend, _FAINT, font=_font(14))
    return page


def _panels(grids: Sequence[MapGrid]) -> list[list[MapGrid]]:
    """Tiles share one panel, since they show different parts of the image."""
    tiles = [grid for grid in grids if grid.name.startswith(("tile", "mosaic"))]
    return [[grid] for grid in grids if grid not in tiles] + ([tiles] if tiles else [])


def _caption(panel: Sequence[MapGrid]) -> str:
    counts = [sum(column) for column in zip(*(grid.count() for grid in panel), strict=True)]
    name = panel[0].name if len(panel) == 1 else f"{len(panel)} tiles"
    shape = f"{panel[0].rows} x {panel[0].columns} tokens" + (" each" if len(panel) > 1 else "")
    merged, alone, dropped = counts
    what = f"{shape}: {merged} merged groups, {alone} alone, {dropped} dropped"
    return f"{name}, {what}" if name else what


def _panel(image: Image.Image, grids: Sequence[MapGrid]) -> Image.Image:
    dim = ImageEnhance.Brightness(ImageEnhance.Color(image).enhance(0.2)).enhance(0.3)
    panel = dim.copy()
    outlines = Image.new("RGBA", image.size)
    for grid in grids:
        cells = _CellLayout(grid, image.size)
        colours = _colours(grid)
        fill = Image.new("RGBA", image.size)
        pen = ImageDraw.Draw(fill)
        for token, group in enumerate(grid.group):
            if group >= 0:
                panel.paste(image.crop(cells.of(token)), cells.of(token)[:2])
                if (colour := colours.get(group)) is not None:
                    pen.rectangle(cells.inner(token), (*colour, 70))
        panel.paste(fill, mask=fill)
        _outline(ImageDraw.Draw(outlines), grid, cells, colours)
    panel.paste(outlines, mask=outlines)
    return panel


class _CellLayout:
    """Where the tokens of a grid lie in a picture."""

    def __init__(self, grid: MapGrid, size: tuple[int, int]) -> None:
        left, top, right, bottom = grid.box
        self._columns, self._size = grid.columns, size
        self.x = [round((left + (right - left) * i / grid.columns) * size[0]) for i in range(grid.columns + 1)]
        self.y = [round((top + (bottom - top) * i / grid.rows) * size[1]) for i in range(grid.rows + 1)]

    def of(self, token: int) -> tuple[int, int, int, int]:
        """Left, top, right, bottom, within the picture."""
        row, column = divmod(token, self._columns)
        left, right = (min(max(x, 0), self._size[0]) for x in self.x[column : column + 2])
        top, bottom = (min(max(y, 0), self._size[1]) for y in self.y[row : row + 2])
        return left, top, right, bottom

    def inner(self, token: int) -> tuple[int, int, int, int]:
        left, top, right, bottom = self.of(token)
        return left, top, max(left, right - 1), max(top, bottom - 1)


def _colours(grid: MapGrid) -> dict[int, Colour]:
    """Colours of merged groups: successive groups get hues far apart."""
    colours: dict[int, Colour] = {}
    merged = [group for group in dict.fromkeys(grid.group) if group >= 0 and grid.sizes[group] > 1]
    for i, group in enumerate(merged):
        if grid.sizes[group] > _REST * len(grid.group):
            colours[group] = (110, 115, 125)
            continue
        red, green, blue = colorsys.hsv_to_rgb(i * _GOLDEN % 1, 0.9, 1.0)
        colours[group] = (round(255 * red), round(255 * green), round(255 * blue))
    return colours


def _outline(pen: ImageDraw.ImageDraw, grid: MapGrid, cells: _CellLayout, colours: Mapping[int, Colour]) -> None:
    """Draws a band inside each group's border, white for single tokens, and a dark line between groups."""
    band = max(3, (cells.x[-1] - cells.x[0]) // grid.columns // 12)
    for token, group in enumerate(grid.group):
        if group < 0:
            continue
        left, top, right, bottom = cells.inner(token)
        sides = {
            -1: (left, top, min(left + band, right), bottom),
            1: (max(right - band, left), top, right, bottom),
            -grid.columns: (left, top, right, min(top + band, bottom)),
            grid.columns: (left, max(bottom - band, top), right, bottom),
        }
        for step, box in sides.items():
            if _neighbour(grid, token, step) != group:
                pen.rectangle(box, (*colours.get(group, _ALONE), 255))
    for token, group in enumerate(grid.group):
        left, top, right, bottom = cells.of(token)
        if group != _neighbour(grid, token, 1):
            pen.line((right, top, right, bottom), _BETWEEN, 2)
        if group != _neighbour(grid, token, grid.columns):
            pen.line((left, bottom, right, bottom), _BETWEEN, 2)


def _neighbour(grid: MapGrid, token: int, step: int) -> int | None:
    """Group of the neighbouring token; None beyond the grid."""
    other = token + step
    is_beside = abs(step) > 1 or other // grid.columns == token // grid.columns
    return grid.group[other] if is_beside and 0 <= other < len(grid.group) else None


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
