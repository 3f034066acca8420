"""PixelPrune: Pixel-Level Adaptive Visual Token Reduction via Predictive Coding.

A cell is the square of pixels that becomes one token. Cells that are predicted by their left and upper neighbours, by
JPEG-LS's edge rule, never enter the tower. Integer arithmetic on pixels decides, so the count is known before encoding.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from foldserve.reducers.geometry import VisionGeometry
from foldserve.reducers.method import Kind, Preselection
from foldserve.reducers.options import ChoiceOption, NumberOption
from foldserve.reducers.refusal import InvalidReduction

Prediction = Literal["anchored", "sliding"]

_WORD = 8  # bytes of a mask per integer


@dataclass(frozen=True, slots=True)
class Cells:
    """The cells of an image that the tower sees."""

    mask: bytes  # a bit per cell in raster order, lowest bit first, padded to whole words

    @classmethod
    def of(cls, stays: Tensor) -> Cells:
        """Takes (cells,) or (rows, columns) bool."""
        flat = stays.flatten()
        bits = torch.zeros(-(-len(flat) // (8 * _WORD)) * 8 * _WORD, dtype=torch.uint8)
        bits[: len(flat)] = flat
        return cls(bytes((bits.view(-1, 8) << _bits()).sum(dim=1, dtype=torch.uint8).tolist()))

    @property
    def kept(self) -> int:
        return int.from_bytes(self.mask).bit_count()

    def places(self) -> Tensor:
        """(kept,) int64 indices of the kept cells, ascending, on the CPU."""
        packed = torch.frombuffer(bytearray(self.mask), dtype=torch.uint8)
        return (packed.unsqueeze(1) >> _bits() & 1).flatten().nonzero().flatten()

    def to_ints(self) -> tuple[int, ...]:
        return struct.unpack(f"<{len(self.mask) // _WORD}q", self.mask)

    @classmethod
    def from_ints(cls, ints: tuple[int, ...]) -> Cells:
        return cls(struct.pack(f"<{len(ints)}q", *ints))


def _bits() -> Tensor:
    return torch.arange(8, dtype=torch.uint8)


class Predicted(NamedTuple):
    stays: Tensor  # (rows, columns) bool
    difference: Tensor  # (rows, columns) uint8, of a cell from its prediction; 255 for the first cell, which has none


def predict(cells: Tensor, tau: int, prediction: Prediction = "anchored") -> Predicted:
    """Which cells differ by more than tau from the prediction by their neighbours.

    The prediction is the left neighbour; it is the upper one in the first column, and if the upper left neighbour is
    like the left but unlike the upper one, as at an edge between the two columns.

    Args:
        cells: (rows, columns, values) uint8, on the CPU.
        tau: largest difference, 0 to 255, between values of cells that are alike.
        prediction: "anchored" compares with the reconstruction: a neighbour's own pixels if it stays, else those of
            its prediction, so no error exceeds tau. "sliding" compares with the neighbours' own pixels: all cells at
            once, but errors can add up along a gradient.
    """
    if tau == 0 or prediction == "sliding":  # with tau 0 the reconstruction is exact, so both are the same
        return _sliding(cells, tau)
    return _anchored(cells, tau)


def unpredicted(cells: Tensor, levels: int) -> int:
    """How many cells of an image the "sliding" prediction misses by more than `levels`, see `predict`."""
    return int(predict(cells, levels, "sliding").stays.sum())


def largest_difference(a: Tensor, b: Tensor) -> Tensor:
    """(..., values) uint8 -> (...) uint8."""
    return (torch.maximum(a, b) - torch.minimum(a, b)).amax(dim=-1)


def _sliding(cells: Tensor, tau: int) -> Predicted:
    left, upper = _from_neighbours(cells)
    edge_above = (upper[1:, :-1] <= tau) & (left[:-1, 1:] > tau)  # corner and left are alike, corner and upper are not
    difference = left.clone()
    difference[:, 0] = upper[:, 0]
    difference[1:, 1:] = torch.where(edge_above, upper[1:, 1:], left[1:, 1:])
    return _stays(difference, tau)


def _anchored(cells: Tensor, tau: int) -> Predicted:
    """Cell by cell: most pairs are equal or neighbours, whose comparison is known. Whole anti-diagonals repeat it."""
    rows, columns, _ = cells.shape
    flat = cells.flatten(0, 1)
    left_of: list[int]
    upper_of: list[int]
    left_of, upper_of = (table.flatten().tolist() for table in _from_neighbours(cells))

    def apart(a: int, b: int) -> int:
        if a < b:
            a, b = b, a
        if a == b:
            return 0
        if a - b == columns:
            return upper_of[a]
        if a - b == 1 and a % columns:
            return left_of[a]
        return int(largest_difference(flat[a], flat[b]))

    difference = [255] * len(flat)
    same = list(range(len(flat)))  # the first known cell with the same pixels: most pairs are then one cell
    shown = list(range(len(flat)))  # the cell whose pixels the reconstruction has in each place
    for cell in range(1, len(flat)):
        if left_of[cell] == 0:
            same[cell] = same[cell - 1]
        elif upper_of[cell] == 0:
            same[cell] = same[cell - columns]
        if cell < columns:
            predicted = shown[cell - 1]
        elif cell % columns == 0:
            predicted = shown[cell - columns]
        else:
            left, upper, corner = shown[cell - 1], shown[cell - columns], shown[cell - columns - 1]
            edge_above = left != upper and apart(corner, left) <= tau < apart(corner, upper)
            predicted = upper if edge_above else left
        difference[cell] = apart(same[cell], predicted)
        shown[cell] = predicted if difference[cell] <= tau else same[cell]
    return _stays(torch.tensor(difference, dtype=torch.uint8).view(rows, columns), tau)


def _from_neighbours(cells: Tensor) -> tuple[Tensor, Tensor]:
    """Difference of each cell from its left and its upper neighbour, (rows, columns) each; 255 if it has none."""
    left, upper = (cells.new_full(cells.shape[:2], 255) for _ in range(2))
    left[:, 1:] = largest_difference(cells[:, 1:], cells[:, :-1])
    upper[1:] = largest_difference(cells[1:], cells[:-1])
    return left, upper


def _stays(difference: Tensor, tau: int) -> Predicted:
    stays = difference > tau
    stays[0, 0] = True  # whatever tau is
    return Predicted(stays, difference)


class PixelPrune(Preselection):
    """Pixels decide how many cells stay. An amount is the minimum, or the limit of the method that follows."""

    name = "pixelprune"
    summary = (
        "Leaves out of the vision tower what the pixels to the left and above predict, as a page's background; the "
        "image decides how much, and `ratio` or `keep_tokens` only how much stays at least."
    )
    paper = "PixelPrune: Pixel-Level Adaptive Visual Token Reduction via Predictive Coding"
    kind = Kind.INPUT
    keeps_positions = True
    options = (
        NumberOption("tau", 0, "largest difference, in levels, of pixels that are alike", 0, 255),
        ChoiceOption(
            "predictor",
            "anchored",
            "from what a decoder would show, so that no error is above tau, or from the neighbours' own pixels",
            ("anchored", "sliding"),
        ),
    )
    tau: int
    predictor: Prediction

    def check(self, geometry: VisionGeometry) -> None:
        super().check(geometry)
        if not geometry.takes_cells:
            raise InvalidReduction(
                f"method {self.name!r} needs a vision tower that can see some cells of one image, each by itself, as "
                "LLaVA-1.5's and Qwen-VL's can: this model's can't, choose another method",
                "method",
            )

    def choose(self, cells: Tensor, min_kept: int) -> Cells | None:
        """The cells that stay, of (rows, columns, values) uint8 on the CPU; None if all do.

        If fewer than `min_kept` would stay, those that differ most from their prediction stay too; ties keep the last.
        """
        stays, difference = predict(cells, self.tau, self.predictor)
        if int(stays.sum()) < min_kept:
            rank = difference.int().masked_fill(stays, 256).flatten()
            most = rank.flip(0).argsort(descending=True, stable=True)[:min_kept]
            stays = torch.zeros_like(stays).flatten().index_fill(0, len(rank) - 1 - most, True).view_as(stays)
        return None if bool(stays.all()) else Cells.of(stays)
