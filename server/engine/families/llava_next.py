"""LLaVA-NeXT (1.6): the whole image as one tile, and a mosaic of tiles in the image's shape with a newline per row.

After the tower, both are reduced as separate grids; newlines stay. Methods in or before the tower reduce tile by tile,
and the mosaic is then laid out from smaller tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from itertools import islice
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape
from vllm.config import ModelConfig
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.model_executor.models.vision import get_vision_encoder_info
from vllm.multimodal import MULTIMODAL_REGISTRY

from foldserve.reducers.geometry import Stage, VisionGeometry
from foldserve.reducers.item import ItemPlan, Layout, Part
from foldserve.reducers.plan import Plan
from foldserve.server.engine.families.llava import ImageTokens, geometry_of
from foldserve.server.engine.family import AfterTowerFamily, Modality
from foldserve.server.engine.model import FoldModel
from foldserve.server.engine.regions import WHOLE, Box, Region, sides, split_box
from foldserve.server.engine.vision import KeptTokens, encode_images, project_together

_STAGES = frozenset({Stage.AFTER_TOWER, Stage.DECODER})


class Mosaic(NamedTuple):
    """Tiles of an image, and the rows and columns of tokens that stay after padding is cut off."""

    down: int
    across: int
    rows: range
    columns: range


class LlavaNextFamily(AfterTowerFamily):
    """`Layout.shape` is (height, width) of the image in pixels.

    Args:
        pinpoints: (height, width) of the possible canvases, in pixels.
        tile_pixels: side of a tile.
        tile: see `Tiling`.
    """

    shape_ints = 2

    def __init__(self, pinpoints: Sequence[Sequence[int]], tile_pixels: int, tile: VisionGeometry) -> None:
        self._pinpoints, self._tile_pixels, self.tile = pinpoints, tile_pixels, tile
        self._side = isqrt(tile.tokens)

    @classmethod
    def of(cls, model_config: ModelConfig) -> LlavaNextFamily | None:
        hf_config = model_config.hf_config
        geometry = geometry_of(hf_config)
        if geometry is None or geometry.grid is None:
            return None
        tile_pixels = get_vision_encoder_info(hf_config).get_image_size()
        return cls(hf_config.image_grid_pinpoints, tile_pixels, replace(geometry, any_resolution=True))

    @cached_property
    def largest(self) -> Layout:
        return max((self.layout((height, width)) for height, width in self._pinpoints), key=lambda it: it.tokens)

    def shape(self, images: Any, index: int, info: Any, kwargs: Mapping[str, object]) -> tuple[int, ...]:
        size = images.get_image_size(index)
        return size.height, size.width

    def layout(self, shape: tuple[int, ...]) -> Layout:
        return self.of_squares(shape, self._side)

    def base(self, shape: tuple[int, ...]) -> Layout | None:
        """The layout of an image without a mosaic."""
        return Layout((Part(self._grid(self._side, self._side), separators=1),), shape, self)

    def of_squares(self, shape: tuple[int, ...], side: int) -> Layout:
        rows, columns = self._mosaic_grid(shape, side)
        whole, tiles = self._grid(side, side), self._grid(rows, columns)
        parts = Part(whole, name="the base tile"), Part(tiles, separators=rows, name="the mosaic of tiles")
        return Layout(parts, shape, self)

    def grids(self, model: Any, inputs: Mapping[str, Any], plans: Sequence[ItemPlan]) -> list[list[Tensor]]:
        tiles, counts = self._pixels(model, inputs, plans)
        features = self._features(model, tiles, counts, plans)
        return [self._grids(image, plan) for image, plan in zip(features, plans, strict=True)]

    def project(self, model: Any, features: Sequence[Tensor]) -> Sequence[Tensor]:
        projected: Sequence[Tensor] = project_together(model.multi_modal_projector, features)
        return projected

    def pack(self, model: Any, grids: Sequence[KeptTokens], plan: ItemPlan) -> KeptTokens:
        if len(plan.laid_out.parts) == 1:
            return end_all(grids, model.image_newline, plan)
        whole, mosaic = grids
        rows, columns = plan.laid_out.parts[1].geometry.grid or (0, 0)
        with_newlines = end_rows(mosaic, rows, columns, model.image_newline)
        return KeptTokens(
            torch.cat([whole.features, with_newlines.features]),
            torch.cat([whole.source, with_newlines.source + self._side**2]),
        )

    def _grid(self, rows: int, columns: int) -> VisionGeometry:
        return grid_geometry(rows, columns, shows_tower=True)

    def kept_grids(
        self, model: Any, inputs: Mapping[str, Any], plan: ItemPlan, queries: Sequence[Tensor] = ()
    ) -> Sequence[KeptTokens]:
        if plan.tile is None or plan.tile.is_identity:
            return super().kept_grids(model, inputs, plan, queries)
        tiles, (count,) = self._pixels(model, inputs, [plan])
        return self._kept_tiles(model, tiles, [plan.tile] * count)

    def regions(self, plan: ItemPlan, modality: Modality, size: tuple[int, int], info: Any) -> list[Region]:
        """Tile by tile if the plan acts on tiles before they are laid out, else base tile and mosaic."""
        shape, side = plan.layout.shape, self._side
        mosaic = self._mosaic(shape, side)
        canvas = self._canvas_box(shape, mosaic)
        if plan.tile is not None and not plan.tile.is_identity:
            return [Region("base", side, side, WHOLE, plan.tile), *self._tile_regions(shape, plan.tile, canvas)]
        grid, of_mosaic = sides(plan.layout.parts[1].geometry), None if plan.base_only else plan.grids[1]
        return [
            Region("base", side, side, WHOLE, plan.grids[0]),
            Region("mosaic", *grid, _kept_part(canvas, mosaic, side), of_mosaic),
        ]

    def _tile_regions(self, shape: tuple[int, ...], tile: Plan, canvas: Box) -> Iterator[Region]:
        """Regions of a mosaic whose tiles are reduced one by one before padding is cut off."""
        side, left, mosaic = self._side, isqrt(tile.kept), self._mosaic(shape, self._side)
        kept = self._mosaic(shape, left)
        for i, box in enumerate(split_box(canvas, mosaic.down, mosaic.across)):
            down, across = divmod(i, mosaic.across)
            window = _local(kept.rows, down * left, left), _local(kept.columns, across * left, left)
            yield Region(f"tile {i + 1}", side, side, box, tile, window)

    def _canvas_box(self, shape: tuple[int, ...], mosaic: Mosaic) -> Box:
        """The canvas around an image, in shares of the image."""
        height, width = shape
        high, wide = mosaic.down * self._tile_pixels, mosaic.across * self._tile_pixels
        scale = min(high / height, wide / width)
        y, x = (high / (height * scale) - 1) / 2, (wide / (width * scale) - 1) / 2
        return -x, -y, 1 + x, 1 + y

    def _pixels(self, model: Any, inputs: Mapping[str, Any], plans: Sequence[ItemPlan]) -> tuple[Tensor, list[int]]:
        """(tiles of all images, 3, H, W), the base tile of each image first, and the number of tiles per image."""
        counts = [1 if plan.base_only else 1 + self._tiles(plan.layout.shape) for plan in plans]
        pixels = model._parse_and_validate_image_input(**inputs)["pixel_values"]
        tiles = [image[:count] for image, count in zip(pixels, counts, strict=True)]  # without padding tiles
        return torch.cat(tiles), counts

    def _features(self, model: Any, tiles: Tensor, counts: list[int], plans: Sequence[ItemPlan]) -> Sequence[Tensor]:
        """(tiles, n, C) of each image or video; n is smaller if tokens are removed in or before the tower."""
        each = [plan.tile for plan, count in zip(plans, counts, strict=True) for _ in range(count) if plan.tile]
        if all(plan.is_identity for plan in each):
            features: Tensor = model._image_pixels_to_features(model.vision_tower, tiles)
            return features.split_with_sizes(counts)
        left = iter(self._kept_tiles(model, tiles, each))
        return [torch.stack([tile.features for tile in islice(left, count)]) for count in counts]

    def _kept_tiles(self, model: Any, tiles: Tensor, plans: Sequence[Plan]) -> Sequence[KeptTokens]:
        return encode_images(model.vision_tower, tiles, plans, model.config.vision_feature_select_strategy)

    def _grids(self, tiles: Tensor, plan: ItemPlan) -> list[Tensor]:
        """(tiles, n, C) of an image -> its base tile and mosaic."""
        if plan.base_only:
            return [tiles]
        return [tiles[:1], self._laid_out(tiles[1:], plan.layout.shape)[None]]

    def _tiles(self, shape: tuple[int, ...]) -> int:
        """Number of tiles in the mosaic."""
        mosaic = self._mosaic(shape, self._side)
        return mosaic.down * mosaic.across

    def _mosaic_grid(self, shape: tuple[int, ...], side: int) -> tuple[int, int]:
        """(rows, columns) of a mosaic of tiles of side * side tokens, without padding."""
        mosaic = self._mosaic(shape, side)
        return len(mosaic.rows), len(mosaic.columns)

    def _mosaic(self, shape: tuple[int, ...], side: int) -> Mosaic:
        """Cut as by vLLM's `unpad_image`."""
        height, width = shape
        down, across = get_anyres_image_grid_shape((height, width), self._pinpoints, self._tile_pixels)
        rows, columns = down * side, across * side
        if width / height > columns / rows:
            padding = (rows - int(round(height * (columns / width), 7))) // 2
            return Mosaic(down, across, range(padding, rows - padding), range(columns))
        padding = (columns - int(round(width * (rows / height), 7))) // 2
        return Mosaic(down, across, range(rows), range(padding, columns - padding))

    def _laid_out(self, tiles: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Square tiles (down * across, n, C) -> (rows * columns, C) in raster order."""
        side = isqrt(tiles.shape[1])
        mosaic = self._mosaic(shape, side)
        grid = tiles.view(mosaic.down, mosaic.across, side, side, -1)
        grid = grid.transpose(1, 2).flatten(0, 1).flatten(1, 2)  # (rows, columns, C), padding included
        rows, columns = mosaic.rows, mosaic.columns
        return grid[rows.start : rows.stop, columns.start : columns.stop].flatten(0, 1)


def _kept_part(canvas: Box, mosaic: Mosaic, side: int) -> Box:
    """The part of a canvas whose tokens stay."""
    left, top, right, bottom = canvas
    column, row = (right - left) / (mosaic.across * side), (bottom - top) / (mosaic.down * side)
    rows, columns = mosaic.rows, mosaic.columns
    return (
        left + columns.start * column,
        top + rows.start * row,
        left + columns.stop * column,
        top + rows.stop * row,
    )


def _local(kept: range, first: int, side: int) -> range:
    """The kept rows or columns of a mosaic that lie in the tile beginning at `first`, relative to it."""
    return range(max(0, kept.start - first), min(side, kept.stop - first))


def end_rows(mosaic: KeptTokens, rows: int, columns: int, newline: Tensor) -> KeptTokens:
    """What is left of a grid, in raster order, with a newline after each row, also after empty rows.

    Only the device knows how many tokens of a row are left, so it sorts tokens and newlines together.
    """
    device = mosaic.source.device
    ends = torch.arange(1, rows + 1, device=device) * (columns + 1) - 1
    source, order = torch.cat([mosaic.source + mosaic.source // columns, ends]).sort()
    newlines = newline.to(mosaic.features.dtype).expand(rows, -1)
    return KeptTokens(torch.cat([mosaic.features, newlines])[order], source)


def end_all(grids: Sequence[KeptTokens], newline: Tensor, plan: ItemPlan) -> KeptTokens:
    """What is left of equal grids, one after the other, and a newline at the end."""
    tokens = plan.laid_out.parts[0].geometry.tokens
    last = grids[0].source.new_full((1,), plan.encoded - 1)
    return KeptTokens(
        torch.cat([*(grid.features for grid in grids), newline[None].to(grids[0].features.dtype)]),
        torch.cat([*(grid.source + i * tokens for i, grid in enumerate(grids)), last]),
    )


class FoldLlavaNextMultiModalProcessor(ImageTokens, LlavaNextMultiModalProcessor[LlavaNextProcessingInfo]):
    """See `ImageTokens`."""


@MULTIMODAL_REGISTRY.register_processor(
    FoldLlavaNextMultiModalProcessor, info=LlavaNextProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class FoldLlavaNextForConditionalGeneration(FoldModel, LlavaNextForConditionalGeneration):
    """See `FoldModel`."""


@lru_cache(maxsize=4096)
def grid_geometry(rows: int, columns: int, *, shows_tower: bool = False) -> VisionGeometry:
    """Geometry of a grid that is reduced after the tower."""
    return VisionGeometry(rows * columns, (rows, columns), stages=_STAGES, shows_tower=shows_tower)
