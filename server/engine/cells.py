"""What the pixels of a request's images decide before all else is planned: which cells the tower is to see, or how many
tokens are needed at most.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, uint8
from transformers import BatchFeature
from vllm.inputs import MultiModalHashes
from vllm.multimodal.parse import MultiModalDataItems

from foldserve.reducers.item import Layout, at_least
from foldserve.reducers.pixelprune import Cells, PixelPrune, unpredicted
from foldserve.reducers.reduction import InvalidReduction, Reduction


@dataclass(frozen=True, slots=True)
class Mask:
    """All that decides which cells of an image stay.

    Attributes:
        image: vLLM's hash of it.
        pruning: how they are chosen.
        least: how many have to stay.
    """

    image: str
    layout: Layout
    pruning: PixelPrune
    least: int

    @classmethod
    def of(cls, image: str, layout: Layout, reduction: Reduction) -> Mask | None:
        """None where pixels decide nothing."""
        pruning = reduction.pruning
        return None if pruning is None else cls(image, layout, pruning, at_least(reduction, layout))

    def answer(self, cells: Tensor) -> Cells | None:
        """Of (rows, columns, values); None if all stay. Raises InvalidReduction where values are no bytes."""
        _check_bytes(cells, f"method {self.pruning.name!r} compares bytes", "choose another method", "method")
        return self.pruning.choose(cells, self.least)


@dataclass(frozen=True, slots=True)
class Unpredicted:
    """All that decides how many cells of an image its pixels do not predict.

    Attributes:
        image: vLLM's hash of it.
        levels: see `unpredicted`.
    """

    image: str
    layout: Layout
    levels: int

    def answer(self, cells: Tensor) -> int:
        """Of (rows, columns, values). Raises InvalidReduction where values are no bytes."""
        advice = "give a number, or have the operator run `foldserve calibrate` with `--pixel-cap none`"
        _check_bytes(cells, "ratio 'auto' was calibrated with a pixel cap, which compares bytes", advice, "ratio")
        return unpredicted(cells, self.levels)


Question = Mask | Unpredicted
"""What an image's pixels are asked; equal ones have equal answers, so that each needs to be asked once."""


def _check_bytes(cells: Tensor, what: str, advice: str, param: str) -> None:
    if cells.dtype != uint8:
        raise InvalidReduction(
            f"{what}, and this server's options or its checkpoint's image processor leave none of an image: {advice}",
            param,
        )


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen of a request's images.

    Attributes:
        cells: of each that the tower is to see; None: all.
        hashes: vLLM's own, of all items of the request.
        processed: the images at `places`, which had to be processed for it; None: none.
    """

    cells: tuple[Cells | None, ...]
    hashes: MultiModalHashes
    processed: BatchFeature | None = None
    places: tuple[int, ...] = ()

    def of(self, places: tuple[int, ...]) -> Seen:
        """Of these images alone."""
        processed = self.processed if places == self.places else None
        return Seen(tuple(self.cells[i] for i in places), self.hashes, processed, tuple(range(len(places))))

    def processed_of(self, mm_items: MultiModalDataItems) -> BatchFeature | None:
        """Of all items of the same request, if they have been processed."""
        return self.processed if len(self.places) == sum(mm_items.get_all_counts().values()) else None
