"""Base of families whose images reach the model as tiles of one size, all in one tensor. Video frames are tiles too."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import BatchFeature
from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageSize, MultiModalDataItems

from foldserve.kernels.warm_up import Widths
from foldserve.reducers.geometry import Stage, VisionGeometry
from foldserve.reducers.item import ItemPlan, Layout, Part
from foldserve.server.engine.family import EqualGridsFamily, Modality
from foldserve.server.engine.processor import ShortenedRuns
from foldserve.server.engine.regions import WHOLE, Region, sides, split_box, tile_grid
from foldserve.server.engine.vision import take_members


class TilesFamily(EqualGridsFamily):
    """`Layout.shape` is (tiles,). Tiles are reduced one by one, after the projector.

    Attributes:
        stages: where a tile may be reduced.
        decoder_refusal: see `VisionGeometry`.
        counts: multimodal field with the number of tiles per item, on the CPU; vLLM calls tiles patches.
        tile_fields: multimodal fields with a row per tile of all items, pixels first.
        base_is_last: the whole image comes after its tiles.
    """

    shape_ints = 1
    sends_bytes = False
    stages = frozenset({Stage.AFTER_TOWER, Stage.DECODER})
    decoder_refusal = ""
    counts: ClassVar[Mapping[Modality, str]] = {"image": "num_patches"}
    tile_fields: ClassVar[Mapping[Modality, tuple[str, ...]]] = {"image": ("pixel_values",)}
    base_is_last: ClassVar[bool] = True

    def __init__(self, model_config: ModelConfig, side: int) -> None:
        """`side` is a tile's, in tokens."""
        self._model_config = model_config
        self._tile = VisionGeometry(side**2, (side, side), stages=self.stages, decoder_refusal=self.decoder_refusal)

    @abstractmethod
    def tiles(self, info: Any, size: ImageSize, kwargs: Mapping[str, object]) -> int:
        """Number of tiles of an image by vLLM's formula, with the options of the operator and the request."""

    @abstractmethod
    def largest_size(self, info: Any) -> ImageSize:
        """Size of an image with the most tiles."""

    @cached_property
    def largest(self) -> Layout:
        info = MULTIMODAL_REGISTRY.get_processing_info(self._model_config)
        return self.layout((self.tiles(info, self.largest_size(info), {}),))

    def shape(self, images: Any, index: int, info: Any, kwargs: Mapping[str, object]) -> tuple[int, ...]:
        return (self.tiles(info, images.get_image_size(index), kwargs),)

    def layout(self, shape: tuple[int, ...]) -> Layout:
        return Layout((Part(self._tile, count=shape[0]),), shape)

    def regions(self, plan: ItemPlan, modality: Modality, size: tuple[int, int], info: Any) -> list[Region]:
        """One region per tile; the whole image is one more, see `base_is_last`."""
        tiles = plan.layout.shape[0] - 1
        if modality == "video" or not tiles:
            return super().regions(plan, modality, size, info)
        (tile_plan,), (rows, columns) = plan.grids, sides(self._tile)
        of_tiles = None if plan.base_only else tile_plan
        boxes = split_box(WHOLE, *self.tile_grid(info, size, tiles))
        found = [Region(f"tile {i + 1}", rows, columns, box, of_tiles) for i, box in enumerate(boxes)]
        base = Region("base", rows, columns, WHOLE, tile_plan)
        return [*found, base] if self.base_is_last else [base, *found]

    def tile_grid(self, info: Any, size: tuple[int, int], count: int) -> tuple[int, int]:
        """(down, across) of an image's tiles without the base tile."""
        return tile_grid(size, count)

    def widths(self, model_config: ModelConfig) -> Widths:
        vision = model_config.hf_config.vision_config
        return Widths(model_config.get_inputs_embeds_size(), vision.hidden_size // vision.num_attention_heads)

    def pixels(self, processed: Mapping[str, Any], modality: Modality) -> Sequence[Tensor]:
        return self._tiles_of(processed, modality)[0]

    def select(self, inputs: Mapping[str, Any], places: Sequence[int]) -> dict[str, Any]:
        modality = next(modality for modality, fields in self.tile_fields.items() if fields[0] in inputs)
        each = zip(self.tile_fields[modality], self._tiles_of(inputs, modality), strict=True)
        tiles = {name: torch.cat([items[i] for i in places]) for name, items in each}
        return {**inputs, **tiles, self.counts[modality]: take_members(inputs[self.counts[modality]], places)}

    def _tiles_of(self, inputs: Mapping[str, Any], modality: Modality) -> list[Sequence[Tensor]]:
        """For each of `tile_fields`, the rows of each item."""
        counts = inputs[self.counts[modality]].tolist()
        return [inputs[name].split_with_sizes(counts) for name in self.tile_fields[modality]]


class TiledImages(ShortenedRuns):
    """Modification beside those of `ShortenedRuns`: raises if an item has another number of tiles than planned.

    Plans are made from an item's size, before it is cut.
    """

    def _processed(
        self,
        mm_items: MultiModalDataItems,
        planned: Mapping[Modality, Sequence[ItemPlan]],
        hf_kwargs: Mapping[str, object],
    ) -> BatchFeature:
        processed = super()._processed(mm_items, planned, hf_kwargs)
        for modality, plans in planned.items():
            expected = [plan.layout.shape[0] for plan in plans]
            found = [len(tiles) for tiles in self._planned_family.pixels(processed, modality)]
            if found != expected:
                raise RuntimeError(f"{modality}s of {expected} tiles by their size came out with {found}")
        return processed
