"""PixelPrune: Pixel-Level Adaptive Visual Token Reduction via Predictive Coding.

A cell is the square of pixels of which the tower makes one token. One that its neighbours to the left and above
predict, as JPEG-LS predicts an edge, never enters the tower. Pixels alone decide, in integers, so that the count is
known before anything is encoded.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from foldserve.reducers.geometry import VisionGeometry
from foldserve.reducers.method import Kind, Preselection
from foldserve.reducers.options import Choice, Number
from foldserve.reducers.refusal import InvalidReduction

Prediction = Literal["anchored", "sliding"]

_WORD = 8
"""Bytes of a mask that make one integer."""


@dataclass(frozen=True, slots=True)
class Cells:
    """The cells of an image that the tower sees.

    Attributes:
        mask: a bit for each cell in raster order, the lowest bit of a byte first; whole words.
    """

    mask: bytes

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
        """(kept,) int64, ascending: those that stay, on the CPU."""
        packed = torch.frombuffer(bytearray(self.mask), dtype=torch.uint8)
        return (packed.unsqueeze(1) >> _bits() & 1).flatten().nonzero().flatten()

    def to_ints(self) -> tuple[int, ...]:
        return struct.unpack(f"<{len(self.mask) // _WORD}q", self.mask)

    @classmethod
    def from_ints(cls, ints: tuple[int, ...]) -> Cells:
        """Inverse of `to_ints`."""
        return cls(struct.pack(f"<{len(ints)}q", *ints))


def _bits() -> Tensor:
    return torch.arange(8, dtype=torch.uint8)


class Predicted(NamedTuple):
    """What became of an image's cells, (rows, columns) each.

    Attributes:
        stays: bool.
        difference: of a cell from its prediction, uint8; 255 of the first cell, which has none.
    """

    stays: Tensor
    difference: Tensor


def predict(cells: Tensor, tau: int, prediction: Prediction = "anchored") -> Predicted:
    """Which cells are further than tau from what their neighbours predict.

    The prediction is the left neighbour, or the upper one where the corner between both is like the left and unlike the
    upper: an edge runs between corner and upper. In the first row it is the left neighbour, in the first column the
    upper one.

    Args:
        cells: (rows, columns, values) uint8, on the CPU.
        tau: largest difference of two values, 0 to 255, of cells that are alike.
        prediction: "anchored" compares with what a decoder would show: a cell's own pixels if it stays, else those of
            its prediction, so that no error is above tau. "sliding" compares with the neighbours' own pixels: errors
            can add up along a gradient, but all cells are compared at once.
    """
    if tau == 0 or prediction == "sliding":  # what is predicted exactly is shown as it is
        return _sliding(cells, tau)
    return _anchored(cells, tau)


def unpredicted(cells: Tensor, levels: int) -> int:
    """How many cells of an image, see `predict`, are further than `levels` from their neighbours' own pixels."""
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
    """Cell by cell: most pairs are equal or neighbours, which an anti-diagonal at once would compare anew."""
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
    same = list(range(len(flat)))  # a cell with the same pixels, so that most pairs are one cell
    shown = list(range(len(flat)))  # whose pixels a decoder would show in a cell's place
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
    """How far each cell is from its left and from its upper neighbour, (rows, columns) each; 255 where it has none."""
    left, upper = (cells.new_full(cells.shape[:2], 255) for _ in range(2))
    left[:, 1:] = largest_difference(cells[:, 1:], cells[:, :-1])
    upper[1:] = largest_difference(cells[1:], cells[:-1])
    return left, upper


def _stays(difference: Tensor, tau: int) -> Predicted:
    stays = difference > tau
    stays[0, 0] = True  # whatever tau is
    return Predicted(stays, difference)


class PixelPrune(Preselection):
    """The pixels decide how many cells stay; an amount says how many have to, or what a method behind it leaves."""

    name = "pixelprune"
    summary = (
        "Leaves out of the vision tower what the pixels to the left and above predict, as a page's background; the "
        "image decides how much, and `ratio` or `keep_tokens` only how much stays at least."
    )
    paper = "PixelPrune: Pixel-Level Adaptive Visual Token Reduction via Predictive Coding"
    kind = Kind.INPUT
    keeps_positions = True
    options = (
        Number("tau", 0, "largest difference, in levels, of pixels that are alike", 0, 255),
        Choice(
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

    def choose(self, cells: Tensor, at_least: int) -> Cells | None:
        """The cells that stay; None if all do.

        Where too few would, those stay too that differ most from their prediction, of equal ones the last.

        Args:
            cells: (rows, columns, values) uint8, on the CPU.
            at_least: how many have to stay.
        """
        stays, difference = predict(cells, self.tau, self.predictor)
        if int(stays.sum()) < at_least:
            rank = difference.int().masked_fill(stays, 256).flatten()
            most = rank.flip(0).argsort(descending=True, stable=True)[:at_least]
            stays = torch.zeros_like(stays).flatten().index_fill(0, len(rank) - 1 - most, True).view_as(stays)
        return None if bool(stays.all()) else Cells.of(stays)
