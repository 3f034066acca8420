"""A smaller image instead of fewer tokens of a large one: the control that needs no method at all."""

from __future__ import annotations

from math import isqrt, log

import torch
from torch import Tensor
from torch.nn import functional as F

from foldserve.reducers.geometry import VisionGeometry
from foldserve.reducers.method import BeforeTower, Kind
from foldserve.reducers.refusal import InvalidReduction


def grid_for(wanted: int, grid: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of a grid with at most `wanted` tokens, within `grid`.

    Few numbers are products of two sides in a given proportion. A square becomes the largest grid that is as high as
    wide, or up to half wider, of equally large ones the one nearest to a square. Another grid loses as few tokens and
    is stretched as little as possible: the share of tokens lost is weighed against half the logarithm of the stretch.

    Raises:
        ValueError: not even one token is wanted.
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
        wanted = shape[0] * shape[1]  # a plan is made anew from its count alone, so that has to give the same grid
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
    """(B, 3, H, W), any scale of values -> (B, 3, rows * patch, columns * patch), antialiased bicubic."""
    size = (rows * patch, columns * patch)
    return F.interpolate(pixels.float(), size, mode="bicubic", antialias=True).to(pixels.dtype)


def interpolate_positions(weight: Tensor, grid: tuple[int, int], rows: int, columns: int) -> Tensor:
    """Position embeddings of a tower for another grid; bicubic, as `interpolate_pos_encoding` of transformers.

    Args:
        weight: (n, d), of `grid` in raster order; with a class token (1 + n, d), which keeps its own.

    Returns:
        (rows * columns, d) or (1 + rows * columns, d), dtype of the weight.
    """
    first = len(weight) - grid[0] * grid[1]
    image = weight[first:].float().T.reshape(1, -1, *grid)  # (1, d, rows, columns)
    resized = F.interpolate(image, (rows, columns), mode="bicubic")
    return torch.cat([weight[:first], resized.squeeze(0).flatten(1).T.to(weight.dtype)])


def nearest(grid: tuple[int, int], rows: int, columns: int, device: torch.device) -> Tensor:
    """(rows * columns,) tokens of `grid` that hold the centres of a smaller grid's, both in raster order."""
    row = torch.arange(1, 2 * rows, 2, device=device) * grid[0] // (2 * rows)
    column = torch.arange(1, 2 * columns, 2, device=device) * grid[1] // (2 * columns)
    return (row.unsqueeze(1) * grid[1] + column).flatten()


class Downsample(BeforeTower):
    """The tower runs on the smaller image: its cost falls too, quadratically in its attention."""

    name = "downsample"
    keeps_grid = True
    summary = "Makes the image smaller before the vision tower; the count is the largest grid that fits the ratio."
    kind = Kind.INPUT

    def check(self, geometry: VisionGeometry) -> None:
        super().check(geometry)
        if geometry.grid is None:
            raise InvalidReduction("method 'downsample' needs a grid of tokens, which this model has not", "method")

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
