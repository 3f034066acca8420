"""Coverage masks of shapes and digits, anti-aliased, drawn once."""

from __future__ import annotations

from functools import cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring", "heart")

Mask: TypeAlias = NDArray[np.float32]

_OVERSAMPLING = 6


@cache
def shape_mask(shape: str, size: int) -> Mask:
    """(size, size) coverage in 0..1 of one of `SHAPES`, in pixels."""
    side = size * _OVERSAMPLING
    canvas = Image.new("L", (side, side), 0)
    _draw(ImageDraw.Draw(canvas), shape, side)
    return _coverage(canvas.resize((size, size), Image.Resampling.BOX))


@cache
def digit_mask(digit: str, font_px: int) -> Mask:
    """(height, width) coverage in 0..1 of a digit in Pillow's own font, cut to its ink."""
    canvas = Image.new("L", (2 * font_px, 2 * font_px), 0)
    ImageDraw.Draw(canvas).text((font_px // 2, 2), digit, font=ImageFont.load_default(size=font_px), fill=255)
    return _coverage(canvas.crop(canvas.getbbox()))


def _coverage(canvas: Image.Image) -> Mask:
    mask: Mask = np.divide(np.asarray(canvas), 255, dtype=np.float32)
    return mask


def _draw(draw: ImageDraw.ImageDraw, shape: str, side: int) -> None:
    end, middle = side - 1, side / 2
    if shape == "circle":
        draw.ellipse((0, 0, end, end), fill=255)
    elif shape == "square":
        inset = side * 0.06
        draw.rectangle((inset, inset, end - inset, end - inset), fill=255)
    elif shape == "triangle":
        draw.polygon([(middle, 0), (end, end), (0, end)], fill=255)
    elif shape == "diamond":
        draw.polygon([(middle, 0), (end, middle), (middle, end), (0, middle)], fill=255)
    elif shape == "cross":
        arm = side * 0.17
        draw.rectangle((middle - arm, 0, middle + arm, end), fill=255)
        draw.rectangle((0, middle - arm, end, middle + arm), fill=255)
    elif shape == "ring":
        hole = side * 0.26
        draw.ellipse((0, 0, end, end), fill=255)
        draw.ellipse((hole, hole, end - hole, end - hole), fill=0)
    elif shape == "star":
        angles = -np.pi / 2 + np.arange(10) * np.pi / 5
        radii = np.where(np.arange(10) % 2, 0.21, 0.5) * side
        corners = zip(middle + radii * np.cos(angles), middle + radii * np.sin(angles), strict=True)
        draw.polygon([(float(x), float(y)) for x, y in corners], fill=255)
    elif shape == "heart":
        t = np.linspace(0, 2 * np.pi, 80)
        x = (16 * np.sin(t) ** 3 + 16) / 32
        y = (12 - (13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))) / 29
        draw.polygon([(float(a * side), float(b * side)) for a, b in zip(x, y, strict=True)], fill=255)
    else:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}: got {shape!r}")
