"""A smaller image instead of fewer tokens of a large one: the control that needs no method at all."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor
from torch.nn import functional as F


def grid_for(wanted: int, grid: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of the largest grid with at most `wanted` tokens, rows <= columns <= 1.5 rows, within `grid`.

    Most numbers have no square near by; of equally large grids the one nearest to a square is taken.

    Raises:
        ValueError: not even one token is wanted.
    """
    if wanted < 1:
        raise ValueError(f"no image has {wanted} tokens: at least 1 is possible")
    shapes = [
        (rows, columns)
        for rows in range(1, min(grid[0], isqrt(wanted)) + 1)
        if (columns := min(wanted // rows, 3 * rows // 2, grid[1])) >= rows
    ]
    return max(shapes, key=lambda shape: (shape[0] * shape[1], shape[0]))


def resize(pixels: Tensor, rows: int, columns: int, *, patch: int) -> Tensor:
    """(B, 3, H, W), any scale of values -> (B, 3, rows * patch, columns * patch), antialiased bicubic."""
    size = (rows * patch, columns * patch)
    return F.interpolate(pixels.float(), size, mode="bicubic", antialias=True).to(pixels.dtype)


def interpolate_positions(weight: Tensor, rows: int, columns: int, *, class_token: bool) -> Tensor:
    """Position embeddings of a tower for another grid; bicubic, as `interpolate_pos_encoding` of transformers.

    Args:
        weight: (n, d), of a square grid in raster order; with a class token (1 + n, d), which keeps its own.

    Returns:
        (rows * columns, d) or (1 + rows * columns, d), dtype of the weight.
    """
    first = int(class_token)
    side = isqrt(len(weight) - first)
    image = weight[first:].float().T.unflatten(1, (side, side)).unsqueeze(0)  # (1, d, side, side)
    resized = F.interpolate(image, (rows, columns), mode="bicubic")
    return torch.cat([weight[:first], resized.squeeze(0).flatten(1).T.to(weight.dtype)])
