"""LLaVA-NeXT (1.6): the whole image as one tile, and a mosaic of tiles in the image's own shape, a newline per row.

Both are grids that are reduced by themselves, after the tower; the newlines stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, SiglipVisionConfig
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape
from vllm.config import ModelConfig
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.model_executor.models.vision import get_num_selected_vision_tokens, get_vision_encoder_info
from vllm.multimodal import MULTIMODAL_REGISTRY

from foldserve.reducers.geometry import Stage, VisionGeometry
from foldserve.reducers.item import ItemPlan, Layout, Part
from foldserve.server.engine.families.llava import ImageTokens
from foldserve.server.engine.family import AfterTowerFamily
from foldserve.server.engine.model import FoldModel
from foldserve.server.engine.vision import Survivors

_STAGES = frozenset({Stage.AFTER_TOWER, Stage.DECODER})


class Mosaic(NamedTuple):
    """Tiles (down, across), and the tokens that stay of them where the image is not as wide or as high."""

    down: int
    across: int
    rows: range
    columns: range


class LlavaNextFamily(AfterTowerFamily):
    """`Layout.shape` is (height, width) of the image in pixels.

    Args:
        pinpoints: (height, width) of the canvases that an image may be laid on, in pixels.
        tile: side of a tile, in pixels.
        side: the same in tokens.
    """

    shape_ints = 2

    def __init__(self, pinpoints: Sequence[Sequence[int]], tile: int, side: int) -> None:
        self._pinpoints, self._tile, self._side = pinpoints, tile, side

    @classmethod
    def of(cls, model_config: ModelConfig) -> LlavaNextFamily | None:
        hf_config = model_config.hf_config
        if not isinstance(hf_config.vision_config, CLIPVisionConfig | SiglipVisionConfig):
            return None
        encoder = get_vision_encoder_info(hf_config)
        tile, side = encoder.get_image_size(), encoder.get_patch_grid_length()
        tokens = encoder.get_num_image_tokens(image_width=tile, image_height=tile)
        if get_num_selected_vision_tokens(tokens, hf_config.vision_feature_select_strategy) != side**2:
            return None
        return cls(hf_config.image_grid_pinpoints, tile, side)

    @cached_property
    def largest(self) -> Layout:
        return max((self.layout((height, width)) for height, width in self._pinpoints), key=lambda it: it.tokens)

    def shape(self, images: Any, index: int, info: Any, kwargs: Mapping[str, object]) -> tuple[int, ...]:
        size = images.get_image_size(index)
        return size.height, size.width

    def layout(self, shape: tuple[int, ...]) -> Layout:
        mosaic = self._mosaic(shape)
        rows, columns = len(mosaic.rows), len(mosaic.columns)
        whole, tiles = _geometry(self._side, self._side), _geometry(rows, columns)
        return Layout((Part(whole), Part(tiles, separators=rows)), shape)

    def grids(self, model: Any, inputs: Mapping[str, Any], plans: Sequence[ItemPlan]) -> list[list[Tensor]]:
        mosaics = [self._mosaic(plan.layout.shape) for plan in plans]
        counts = [1 + mosaic.down * mosaic.across for mosaic in mosaics]
        pixels = model._parse_and_validate_image_input(**inputs)["pixel_values"]
        tiles = torch.cat([image[:count] for image, count in zip(pixels, counts, strict=True)])  # no padded ones
        features = model._image_pixels_to_features(model.vision_tower, tiles).split(counts)
        return [[image[:1], self._laid_out(image[1:], m)[None]] for image, m in zip(features, mosaics, strict=True)]

    def project(self, model: Any, features: Tensor) -> Tensor:
        projected: Tensor = model.multi_modal_projector(features)
        return projected

    def pack(self, model: Any, grids: Sequence[Survivors], plan: ItemPlan) -> Survivors:
        whole, mosaic = grids
        rows, columns = plan.layout.parts[1].geometry.grid or (0, 0)
        with_newlines = end_rows(mosaic, rows, columns, model.image_newline)
        return Survivors(
            torch.cat([whole.features, with_newlines.features]),
            torch.cat([whole.source, with_newlines.source + self._side**2]),
        )

    def _mosaic(self, shape: tuple[int, ...]) -> Mosaic:
        """As vLLM's `unpad_image` cuts it."""
        height, width = shape
        down, across = get_anyres_image_grid_shape((height, width), self._pinpoints, self._tile)
        rows, columns = down * self._side, across * self._side
        if width / height > columns / rows:
            padding = (rows - int(round(height * (columns / width), 7))) // 2
            return Mosaic(down, across, range(padding, rows - padding), range(columns))
        padding = (columns - int(round(width * (rows / height), 7))) // 2
        return Mosaic(down, across, range(rows), range(padding, columns - padding))

    def _laid_out(self, tiles: Tensor, mosaic: Mosaic) -> Tensor:
        """Tiles (down * across, side * side, C) -> (rows * columns, C) in raster order."""
        grid = tiles.view(mosaic.down, mosaic.across, self._side, self._side, -1)
        grid = grid.transpose(1, 2).flatten(0, 1).flatten(1, 2)  # (rows, columns, C), padding included
        rows, columns = mosaic.rows, mosaic.columns
        return grid[rows.start : rows.stop, columns.start : columns.stop].flatten(0, 1)


def end_rows(mosaic: Survivors, rows: int, columns: int, newline: Tensor) -> Survivors:
    """What is left of a grid, in raster order, with a newline after each row; an empty row is a newline.

    How many of a row are left is known on the device alone, so they are sorted there; no length depends on it.
    """
    device = mosaic.source.device
    ends = torch.arange(1, rows + 1, device=device) * (columns + 1) - 1
    source, order = torch.cat([mosaic.source + mosaic.source // columns, ends]).sort()
    newlines = newline.to(mosaic.features.dtype).expand(rows, -1)
    return Survivors(torch.cat([mosaic.features, newlines])[order], source)


class FoldLlavaNextMultiModalProcessor(ImageTokens, LlavaNextMultiModalProcessor[LlavaNextProcessingInfo]):
    """See `ImageTokens`."""


@MULTIMODAL_REGISTRY.register_processor(
    FoldLlavaNextMultiModalProcessor, info=LlavaNextProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class FoldLlavaNextForConditionalGeneration(FoldModel, LlavaNextForConditionalGeneration):
    """See `FoldModel`."""


@lru_cache(maxsize=4096)
def _geometry(rows: int, columns: int) -> VisionGeometry:
    return VisionGeometry(rows * columns, (rows, columns), stages=_STAGES)
