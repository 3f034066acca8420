"""The plainest control: resize the image so that the tower gives fewer tokens."""

from __future__ import annotations

from math import isqrt, log

import torch
from torch import Tensor
from torch.nn import functional as F

from foldserve.reducers.geometry import VisionGeometry
from foldserve.reducers.method import BeforeTower, Kind
from foldserve.reducers.refusal import InvalidReduction


def grid_for(wanted: int, grid: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) within `grid`, with at most `wanted` tokens.

    A square grid becomes the largest one whose width is 1 to 1.5 times its height; ties go to the most square. Any
    other grid minimises the share of tokens lost plus half the absolute logarithm of the change of aspect ratio.

    Raises:
        ValueError: `wanted` is less than 1.
    """
    if wanted < 1:
        raise ValueError(f"no image has {wanted} tokens: at least 1 is possible")
    if grid[0] == grid[1]:
        shapes = [
            (rows, columns)
            for rows in range(1, min(grid[0], isqrt(wanted)) + 1)
            if (columns := min(wanted // rows, 3 * rows // 2, grid[1])) >= rows
        ]
        return max(shapes, key=lambda shape: (shape[0] * shape[1], shape[0]))
    while (shape := _in_proportion(wanted, grid))[0] * shape[1] != wanted:
        wanted = shape[0] * shape[1]  # fixed point: `Plan.from_ints` knows only the count and must get the same grid
    return shape


def _in_proportion(wanted: int, grid: tuple[int, int]) -> tuple[int, int]:
    proportion = grid[1] / grid[0]

    def cost(shape: tuple[int, int]) -> float:
        rows, columns = shape
        return (wanted - rows * columns) / wanted + abs(log(columns / rows / proportion)) / 2

    highest = min(grid[0], wanted)
    shapes = [
        (rows, columns)
        for rows in range(1, highest + 1)
        for most in [min(wanted // rows, grid[1])]
        for columns in {most, max(1, min(most, round(proportion * rows)))}
    ]
    return min(shapes, key=lambda shape: (cost(shape), shape))


def resize(pixels: Tensor, rows: int, columns: int, *, patch: int) -> Tensor:
    """(B, 3, H, W) -> (B, 3, rows * patch, columns * patch), antialiased bicubic."""
    size = (rows * patch, columns * patch)
    return F.interpolate(pixels.float(), size, mode="bicubic", antialias=True).to(pixels.dtype)


def interpolate_positions(weight: Tensor, grid: tuple[int, int], rows: int, columns: int) -> Tensor:
    """Position embeddings for another grid: bicubic, as `interpolate_pos_encoding` of transformers.

    Args:
        weight: (n, d) in raster order of `grid`, or (1 + n, d) with a class token, whose embedding stays.

    Returns:
        (rows * columns, d) or (1 + rows * columns, d), dtype of the weight.
    """
    first = len(weight) - grid[0] * grid[1]
    image = weight[first:].float().T.reshape(1, -1, *grid)  # (1, d, rows, columns)
    resized = F.interpolate(image, (rows, columns), mode="bicubic")
    return torch.cat([weight[:first], resized.squeeze(0).flatten(1).T.to(weight.dtype)])


def nearest(grid: tuple[int, int], rows: int, columns: int, device: torch.device) -> Tensor:
    """(rows * columns,) indices into `grid`: the token at the centre of each token of a (rows, columns) grid."""
    row = torch.arange(1, 2 * rows, 2, device=device) * grid[0] // (2 * rows)
    column = torch.arange(1, 2 * columns, 2, device=device) * grid[1] // (2 * columns)
    return (row.unsqueeze(1) * grid[1] + column).flatten()


class Downsample(BeforeTower):
    """The tower runs on the smaller image, so it costs less too."""

    name = "downsample"
    keeps_grid = True
    summary = "Makes the image smaller before the vision tower; the count is the largest grid that fits the ratio."
    kind = Kind.INPUT

    def check(self, geometry: VisionGeometry) -> None:
        super().check(geometry)
        if geometry.grid is None:
            raise InvalidReduction(
                "method 'downsample' needs a grid of vision tokens, but this model has none", "method"
            )

    def removable(self, geometry: VisionGeometry, removed: int) -> int:
        rows, columns = self.grid(geometry, removed)
        return geometry.tokens - rows * columns

    def grid(self, geometry: VisionGeometry, removed: int) -> tuple[int, int]:
        assert geometry.grid is not None  # see check
        if geometry.any_resolution:
            side = isqrt(geometry.tokens - removed)
            return side, side
        return grid_for(geometry.tokens - removed, geometry.grid)

    def resize(self, pixels: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
        return resize(pixels, *grid, patch=patch)

    def source(self, whole: tuple[int, int], grid: tuple[int, int], device: torch.device) -> Tensor:
        return nearest(whole, *grid, device)

    def group(self, whole: tuple[int, int], grid: tuple[int, int]) -> Tensor:
        return nearest(grid, *whole, torch.device("cpu"))
