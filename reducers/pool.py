"""Average pooling: the plain control of every merging method."""

from __future__ import annotations

from math import ceil, isqrt
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foldserve.reducers.fold import Reduced, at_least_fp32
from foldserve.reducers.geometry import VisionGeometry
from foldserve.reducers.method import AfterTower
from foldserve.reducers.options import Choice
from foldserve.reducers.refusal import InvalidReduction

if TYPE_CHECKING:
    from foldserve.reducers.plan import Plan


def windows(x: Tensor, grid: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """Tokens of each window, in raster order as the windows themselves.

    Args:
        x: (B, n, ...), tokens of a grid in raster order.
        grid: (rows, columns); n = rows * columns.
        window: (rows, columns) of a window; divide those of the grid.

    Returns:
        (B, windows, tokens of a window, ...).

    Raises:
        ValueError: the grid has no whole number of windows.
    """
    (rows, columns), (height, width) = grid, window
    if rows % height or columns % width:
        raise ValueError(f"a grid of {rows} x {columns} tokens has no whole number of {height} x {width} windows")
    cut = x.view(len(x), rows // height, height, columns // width, width, *x.shape[2:]).transpose(2, 3)
    return cut.flatten(1, 2).flatten(2, 3)


def pool(x: Tensor, grid: tuple[int, int], window: tuple[int, int]) -> Reduced:
    """Mean of each window; see `windows`."""
    batch, n = x.shape[:2]
    members = windows(torch.arange(n, device=x.device).expand(batch, n), grid, window)  # (B, windows, k)
    tokens = windows(at_least_fp32(x), grid, window).mean(dim=2).to(x.dtype)
    group = members.flatten(1).argsort(dim=1) // members.shape[2]
    return Reduced(tokens, torch.full_like(members[..., 0], members.shape[2]), members[..., 0], group)


class Pool(AfterTower):
    """One mean per window; the counts that whole windows give are the only ones."""

    name = "pool"
    summary = "Averages k x k windows of vision tokens, or k neighbours in a row; the control of every merging method."
    options = (Choice("window", "square", "k x k windows of the grid, or k in a row of it", ("square", "row")),)
    window: str

    def check(self, geometry: VisionGeometry) -> None:
        super().check(geometry)
        if geometry.grid is None:
            raise InvalidReduction("method 'pool' needs a grid of tokens, which this model has not", "method")

    def removable(self, geometry: VisionGeometry, removed: int) -> int:
        kept = geometry.tokens - removed
        grids = self._grids(geometry)
        if kept not in grids:
            possible = " or ".join(f"{_least_ratio(geometry.tokens, count)} ({count} tokens)" for count in grids)
            raise InvalidReduction(
                f"no whole number of windows leaves {kept} of {geometry.tokens} tokens: give ratio {possible}", "ratio"
            )
        return removed

    def grid(self, geometry: VisionGeometry, removed: int) -> tuple[int, int]:
        return self._grids(geometry)[geometry.tokens - removed]

    def reduce(self, x: Tensor, plan: Plan) -> Reduced:
        assert plan.grid is not None  # see grid
        rows, columns = plan.grid
        size = plan.encoded // plan.kept
        height = isqrt(size) if self.window == "square" else 1
        width = size // height
        return pool(x, (rows * height, columns * width), (height, width))

    def _grids(self, geometry: VisionGeometry) -> dict[int, tuple[int, int]]:
        """Tokens left, at least two -> (rows, columns) of them, for every window that divides the grid."""
        assert geometry.grid is not None  # see check
        rows, columns = geometry.grid
        sizes = [(k if self.window == "square" else 1, k) for k in range(2, columns + 1)]
        whole = [(height, width) for height, width in sizes if not (rows % height or columns % width)]
        grids = [(rows // height, columns // width) for height, width in whole]
        return {height * width: (height, width) for height, width in grids if height * width >= 2}


def _least_ratio(tokens: int, kept: int) -> float:
    """The least ratio with four digits that removes all but `kept` tokens."""
    return ceil(1e4 * (tokens - kept) / tokens) / 1e4
