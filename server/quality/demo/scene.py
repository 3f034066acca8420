"""Synthetic scenes: up to six coloured objects and a number on a noisy background, with a label for every patch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from foldserve.server.quality.demo.glyphs import SHAPES, Mask, digit_mask, shape_mask

IMAGE_PX = 96
PATCH_PX = 8
GRID = IMAGE_PX // PATCH_PX
CELLS = 3  # a scene has 3 x 3 cells with one object at most in each
CELL_PX = IMAGE_PX // CELLS

COLORS = {
    "red": (215, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 75, 215),
    "yellow": (235, 215, 50),
    "purple": (145, 50, 175),
    "orange": (240, 135, 30),
    "cyan": (60, 205, 215),
    "white": (245, 245, 245),
}
COLOR_NAMES = tuple(COLORS)
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
MAX_DIGITS = 4

# Property of what a patch shows -> number of classes; class 0 is background. `row` and `column` are the patch's own
# place. `anchor` marks the one patch that holds an object's centre, so objects can be counted.
LABELS = {
    "shape": 1 + len(SHAPES),
    "color": 1 + len(COLORS),
    "size": 3,
    "digit": 11,
    "index": 1 + MAX_DIGITS,
    "cell": 1 + CELLS**2,
    "anchor": 2,
    "row": GRID,
    "column": GRID,
}

_SMALL_PX, _BIG_PX = (13, 18), (21, 28)  # half-open ranges
_FONT_PX = (20, 22, 24)
_NUMBER_SHARE = 0.55
_MIN_CONTRAST = 150  # sum over RGB between an object and the background
_COUNTS = (0.10, 0.20, 0.22, 0.20, 0.16, 0.12)  # of 1..6 objects
_T = TypeVar("_T")

_MIN_OVERLAP = 8  # square pixels that an object must cover of a patch to label it


@dataclass(frozen=True)
class Object:
    """One object; `cell` is 0..8 in reading order."""

    shape: str
    color: str
    big: bool
    cell: int

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True, eq=False)
class Scene:
    """An image and what it shows.

    Attributes:
        pixels: (96, 96, 3) uint8.
        objects: at least one, in reading order.
        number: 2 to 4 digits, or None.
        number_cells: cells that the number reaches into; they hold no object.
        labels: (144, len(LABELS)) int64 classes.
    """

    pixels: NDArray[np.uint8]
    objects: tuple[Object, ...]
    number: str | None
    number_cells: tuple[int, ...]
    labels: NDArray[np.int64]

    @property
    def image(self) -> Image.Image:
        return Image.fromarray(self.pixels)


class _Canvas:
    """Float pixels, and the label of what covers most of each patch so far."""

    def __init__(self, pixels: NDArray[np.float32]) -> None:
        self.pixels = pixels
        self.labels = np.zeros((GRID, GRID, len(LABELS)), np.int64)
        rows, columns = np.indices((GRID, GRID))
        self.labels[..., -2], self.labels[..., -1] = rows, columns
        self._overlap = np.full((GRID, GRID), _MIN_OVERLAP, np.int64)

    def put(self, mask: Mask, x: int, y: int, color: NDArray[np.float32], label: tuple[int, ...]) -> None:
        """Blends `mask` in at (x, y), and labels each patch of which it covers more than anything drawn before."""
        height, width = mask.shape
        region = self.pixels[y : y + height, x : x + width]
        region += mask[..., None] * (color - region)
        for row in range(y // PATCH_PX, (y + height - 1) // PATCH_PX + 1):
            for column in range(x // PATCH_PX, (x + width - 1) // PATCH_PX + 1):
                overlap = _shared(y, height, row) * _shared(x, width, column)
                if overlap > self._overlap[row, column]:
                    self._overlap[row, column] = overlap
                    self.labels[row, column, : len(label)] = label

    def mark_anchor(self, x: int, y: int) -> None:
        self.labels[y // PATCH_PX, x // PATCH_PX, tuple(LABELS).index("anchor")] = 1


def draw_scene(rng: np.random.Generator) -> Scene:
    """Draws a scene; equal generator states give equal scenes."""
    light = rng.random() < 0.3
    base = rng.integers(150, 225, 3) if light else rng.integers(0, 95, 3)
    canvas = _Canvas(_background(rng, base))
    number, number_cells = _put_number(rng, canvas, light) if rng.random() < _NUMBER_SHARE else (None, ())
    free = [cell for cell in range(CELLS**2) if cell not in number_cells]
    count = min(len(free), 1 + int(rng.choice(len(_COUNTS), p=_COUNTS)))
    # Four scenes of ten have few colours, and four of ten few shapes: counting needs objects that share one.
    colors = COLOR_NAMES if rng.random() < 0.6 else _three(rng, COLOR_NAMES)
    shapes = SHAPES if rng.random() < 0.6 else _three(rng, SHAPES)
    cells = sorted(int(cell) for cell in rng.permutation(free)[:count])
    objects = tuple(_put_object(rng, canvas, cell, _pick_color(rng, colors, base), pick(rng, shapes)) for cell in cells)
    noise = rng.normal(0, rng.uniform(1, 6), (IMAGE_PX, IMAGE_PX, 1)).astype(np.float32)
    pixels = np.clip(canvas.pixels + noise, 0, 255).astype(np.uint8)
    return Scene(pixels, objects, number, number_cells, canvas.labels.reshape(GRID * GRID, -1))


def _background(rng: np.random.Generator, base: NDArray[np.int64]) -> NDArray[np.float32]:
    """A colour with a slight gradient in each direction."""
    across, down = rng.normal(0, 14, (2, 3)).astype(np.float32)
    ramp = np.linspace(-1, 1, IMAGE_PX, dtype=np.float32)
    pixels: NDArray[np.float32] = base.astype(np.float32) + ramp[None, :, None] * across + ramp[:, None, None] * down
    return pixels


def _put_number(rng: np.random.Generator, canvas: _Canvas, light: bool) -> tuple[str, tuple[int, ...]]:
    digits = [str(digit) for digit in rng.integers(0, 10, int(rng.integers(2, MAX_DIGITS + 1)))]
    font_px, gap = pick(rng, _FONT_PX), int(rng.integers(2, 4))
    masks = [digit_mask(digit, font_px) for digit in digits]
    width = sum(mask.shape[1] for mask in masks) + gap * (len(masks) - 1)
    height = max(mask.shape[0] for mask in masks)
    span = -(-(width + 2) // CELL_PX)
    row, column = int(rng.integers(CELLS)), int(rng.integers(CELLS - span + 1))
    x = column * CELL_PX + int(rng.integers(1, span * CELL_PX - width))
    y = row * CELL_PX + int(rng.integers(2, CELL_PX - height))
    color = np.full(3, 15 if light else 250, np.float32)
    cells = tuple(row * CELLS + column + i for i in range(span))
    for index, (digit, mask) in enumerate(zip(digits, masks, strict=True), start=1):
        label = (0, 0, 0, int(digit) + 1, index, 1 + cells[min((x - column * CELL_PX) // CELL_PX, span - 1)])
        canvas.put(mask, x, y + height - mask.shape[0], color, label)
        x += mask.shape[1] + gap
    return "".join(digits), cells


def _put_object(rng: np.random.Generator, canvas: _Canvas, cell: int, color: str, shape: str) -> Object:
    big = bool(rng.random() < 0.5)
    size = int(rng.integers(*(_BIG_PX if big else _SMALL_PX)))
    x = cell % CELLS * CELL_PX + int(rng.integers(1, CELL_PX - size))
    y = cell // CELLS * CELL_PX + int(rng.integers(1, CELL_PX - size))
    tint = (np.array(COLORS[color]) + rng.normal(0, 8, 3)).astype(np.float32)
    label = (1 + SHAPES.index(shape), 1 + COLOR_NAMES.index(color), 1 + big, 0, 0, 1 + cell)
    canvas.put(shape_mask(shape, size), x, y, tint, label)
    canvas.mark_anchor(x + size // 2, y + size // 2)
    return Object(shape, color, big, cell)


def _pick_color(rng: np.random.Generator, names: tuple[str, ...], base: NDArray[np.int64]) -> str:
    """One of `names` that stands out from the background, else any colour that does."""

    def visible(name: str) -> bool:
        return int(np.abs(np.array(COLORS[name]) - base).sum()) > _MIN_CONTRAST

    return pick(rng, [name for name in names if visible(name)] or [name for name in COLORS if visible(name)])


def pick(rng: np.random.Generator, options: Sequence[_T]) -> _T:
    return options[int(rng.integers(len(options)))]


def _three(rng: np.random.Generator, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(str(name) for name in rng.permutation(names)[:3])


def _shared(start: int, length: int, patch: int) -> int:
    """Overlap in pixels of [start, start + length) with a row or column of patches."""
    return min(start + length, (patch + 1) * PATCH_PX) - max(start, patch * PATCH_PX)
