"""Average pooling: the control of every merging method."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from foldserve.reducers.fold import Reduced, at_least_fp32, by_columns
from foldserve.reducers.geometry import VisionGeometry
from foldserve.reducers.method import AfterTower, Kind
from foldserve.reducers.options import ChoiceOption
from foldserve.reducers.refusal import InvalidReduction
from foldserve.reducers.schedule import least_ratio

if TYPE_CHECKING:
    from foldserve.reducers.plan import Plan


def windows(x: Tensor, grid: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """(B, rows * columns, ...) -> (B, windows, tokens per window, ...), all in raster order.

    Raises:
        ValueError: the window (rows, columns) does not divide the grid.
    """
    (rows, columns), (height, width) = grid, window
    if rows % height or columns % width:
        raise ValueError(f"a grid of {rows} x {columns} tokens has no whole number of {height} x {width} windows")
    cut = x.view(len(x), rows // height, height, columns // width, width, *x.shape[2:]).transpose(2, 3)
    return cut.flatten(1, 2).flatten(2, 3)


def pool(x: Tensor, grid: tuple[int, int], window: tuple[int, int]) -> Reduced:
    """Mean of each window; see `windows`. If the window does not divide the grid, the last ones are smaller."""
    if grid[0] % window[0] or grid[1] % window[1]:
        return _pool_with_a_rest(x, grid, window)
    batch, n = x.shape[:2]
    members = windows(torch.arange(n, device=x.device).expand(batch, n), grid, window)  # (B, windows, k)
    tokens = by_columns(x, members.shape[1], lambda some: windows(at_least_fp32(some), grid, window).mean(dim=2))
    group = members.flatten(1).argsort(dim=1) // members.shape[2]
    return Reduced(tokens, torch.full_like(members[..., 0], members.shape[2]), members[..., 0], group)


def _pool_with_a_rest(x: Tensor, grid: tuple[int, int], window: tuple[int, int]) -> Reduced:
    (rows, columns), (height, width) = grid, window

    def means(some: Tensor) -> Tensor:
        image = at_least_fp32(some).mT.reshape(len(some), -1, *grid)  # (B, d, rows, columns)
        return F.avg_pool2d(image, window, ceil_mode=True).flatten(2).mT  # smaller windows divide by their own size

    row, column = torch.arange(rows, device=x.device), torch.arange(columns, device=x.device)
    first_row, first_column = row[::height].unsqueeze(1), column[::width]
    source = first_row * columns + first_column
    sizes = (rows - first_row).clamp(max=height) * (columns - first_column).clamp(max=width)
    group = (row // height).unsqueeze(1) * len(first_column) + column // width
    tokens = by_columns(x, source.numel(), means)
    return Reduced(tokens, *(each.flatten().expand(len(x), -1) for each in (sizes, source, group)))


class Pool(AfterTower):
    """One mean per window.

    On a fixed grid, only counts from whole windows are possible. If the grid depends on the image's size, the smallest
    window that leaves no more tokens than asked for is taken, and the last windows of a row or column may be smaller.
    """

    name = "pool"
    summary = "Averages k x k windows of vision tokens, or k neighbours in a row; the control of every merging method."
    kind = Kind.MERGE
    keeps_grid = True
    options = (ChoiceOption("window", "square", "k x k windows of the grid, or k in a row of it", ("square", "row")),)
    window: str

    def check(self, geometry: VisionGeometry) -> None:
        super().check(geometry)
        if geometry.grid is None:
            raise InvalidReduction("method 'pool' needs a grid of vision tokens, but this model has none", "method")

    def removable(self, geometry: VisionGeometry, removed: int) -> int:
        kept = geometry.tokens - removed
        grids = self._grids(geometry)
        if geometry.varies:
            return geometry.tokens - max((count for count in grids if count <= kept), default=0)
        if kept not in grids:
            possible = " or ".join(f"{least_ratio(geometry.tokens, count)} ({count} tokens)" for count in grids)
            raise InvalidReduction(
                f"no whole number of windows leaves {kept} of {geometry.tokens} tokens: give ratio {possible}", "ratio"
            )
        return removed

    def grid(self, geometry: VisionGeometry, removed: int) -> tuple[int, int]:
        return self._grids(geometry)[geometry.tokens - removed]

    def reduce(self, x: Tensor, plan: Plan, width: int | None = None) -> Reduced:
        assert plan.whole_grid is not None  # see check
        windows = self._windows(plan.whole_grid)
        return pool(x, plan.whole_grid, next(window for window, grid in windows if grid == plan.grid))

    def _grids(self, geometry: VisionGeometry) -> dict[int, tuple[int, int]]:
        """Number of tokens left, at least two -> their (rows, columns), for every possible window."""
        assert geometry.grid is not None  # see check
        rows, columns = geometry.grid
        return {
            grid[0] * grid[1]: grid
            for (height, width), grid in self._windows(geometry.grid)
            if grid[0] * grid[1] >= 2 and (geometry.varies or not (rows % height or columns % width))
        }

    def _windows(self, whole: tuple[int, int]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Windows and the grids that they leave of `whole`, the smallest window first."""
        rows, columns = whole
        sizes = [(k if self.window == "square" else 1, k) for k in range(2, max(whole) + 1)]
        return [((height, width), (ceil(rows / height), ceil(columns / width))) for height, width in sizes]
