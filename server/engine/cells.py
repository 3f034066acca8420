"""Which cells of a request's images the tower is to see: their pixels decide, before all else is planned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, uint8
from transformers import BatchFeature
from vllm.inputs import MultiModalHashes
from vllm.multimodal.parse import MultiModalDataItems

from foldserve.reducers.item import Layout, at_least
from foldserve.reducers.pixelprune import Cells, PixelPrune
from foldserve.reducers.reduction import InvalidReduction, Reduction


class Mask(NamedTuple):
    """All that decides which cells of an image stay, so that they need to be chosen once.

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

    def choose(self, cells: Tensor) -> Cells | None:
        """Of (rows, columns, values); None if all stay. Raises InvalidReduction where values are no bytes."""
        if cells.dtype != uint8:
            raise InvalidReduction(
                f"method {self.pruning.name!r} compares bytes, and this server's options or its checkpoint's image "
                "processor leave none of an image: choose another method",
                "method",
            )
        return self.pruning.choose(cells, self.least)


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
