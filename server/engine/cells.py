"""What pixels decide before anything is planned: which cells the tower sees, or how many tokens an image needs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, uint8
from transformers import BatchFeature
from vllm.inputs import MultiModalHashes
from vllm.multimodal.parse import MultiModalDataItems

from foldserve.reducers.item import Layout, min_kept_cells
from foldserve.reducers.pixelprune import Cells, PixelPrune, unpredicted
from foldserve.reducers.reduction import InvalidReduction, Reduction


@dataclass(frozen=True, slots=True)
class CellMaskQuestion:
    """Everything that determines which cells of an image stay."""

    image: str  # vLLM's hash
    layout: Layout
    pruning: PixelPrune
    least: int  # cells that have to stay

    @classmethod
    def of(cls, image: str, layout: Layout, reduction: Reduction) -> CellMaskQuestion | None:
        """None if the reduction does not choose by pixels."""
        pruning = reduction.pruning
        return None if pruning is None else cls(image, layout, pruning, min_kept_cells(reduction, layout))

    def answer(self, cells: Tensor) -> Cells | None:
        """Cells of (rows, columns, values) that stay; None if all do; raises InvalidReduction unless uint8."""
        _check_bytes(cells, f"method {self.pruning.name!r} compares bytes", "choose another method", "method")
        return self.pruning.choose(cells, self.least)


@dataclass(frozen=True, slots=True)
class CellCountQuestion:
    """Everything that determines how many cells of an image its pixels do not predict."""

    image: str  # vLLM's hash
    layout: Layout
    levels: int  # see `unpredicted`

    def answer(self, cells: Tensor) -> int:
        """Unpredicted cells of (rows, columns, values); raises InvalidReduction unless uint8."""
        advice = "give a number, or have the operator run `foldserve calibrate` with `--pixel-cap none`"
        _check_bytes(cells, "ratio 'auto' was calibrated with a pixel cap, which compares bytes", advice, "ratio")
        return unpredicted(cells, self.levels)


PixelQuestion = CellMaskQuestion | CellCountQuestion
"""A question about an image's pixels; equal questions have equal answers, so answers are cached."""


def _check_bytes(cells: Tensor, what: str, advice: str, param: str) -> None:
    if cells.dtype != uint8:
        raise InvalidReduction(
            f"{what}, and this server's options or its checkpoint's image processor leave none of an image: {advice}",
            param,
        )


@dataclass(frozen=True, slots=True)
class PixelFindings:
    """What is known from the pixels of a request's images."""

    cells: tuple[Cells | None, ...]  # of each image, those that the tower sees; None: all
    hashes: MultiModalHashes  # vLLM's own, of all items of the request
    processed: BatchFeature | None = None  # the images at `places`, if they had to be processed
    places: tuple[int, ...] = ()

    def subset(self, places: tuple[int, ...]) -> PixelFindings:
        """The same for a subset of the images."""
        processed = self.processed if places == self.places else None
        return PixelFindings(tuple(self.cells[i] for i in places), self.hashes, processed, tuple(range(len(places))))

    def processed_of(self, mm_items: MultiModalDataItems) -> BatchFeature | None:
        """All items of the request, if they have all been processed."""
        return self.processed if len(self.places) == sum(mm_items.get_all_counts().values()) else None
