"""LLaVA-OneVision: images as in LLaVA-NeXT, except that large mosaics are shrunk; also videos.

Mosaics shrink after the projector, which is not linear, so all grids are reduced there. A video's frames are pooled and
reduced by the same plan; a newline follows the last frame.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from math import ceil, isqrt, sqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BatchFeature
from vllm.config import ModelConfig
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageSize, MultiModalDataItems
from vllm.multimodal.processing import BaseMultiModalProcessor

from foldserve.kernels.warm_up import Widths
from foldserve.reducers.geometry import VisionGeometry
from foldserve.reducers.item import ItemPlan, Layout, Part
from foldserve.reducers.reduction import Reduction
from foldserve.server.engine.families.llava import ImageTokens
from foldserve.server.engine.families.llava_next import LlavaNextFamily, grid_geometry
from foldserve.server.engine.families.registry import family_of
from foldserve.server.engine.family import PIXEL_FIELDS, Modality, asks_for_frames
from foldserve.server.engine.model import FoldModel
from foldserve.server.engine.regions import WHOLE, Region, sides

_ILLAVA_VIDEO_LAYERS = (3, 4, 5, 6)
_MOST_TILES = 9
"""Larger mosaics shrink to about the tokens of so many tiles: 9 in vLLM, whatever the checkpoint's config says."""


class LlavaOnevisionFamily(LlavaNextFamily):
    """`Layout.shape` of a video is (frames, 0)."""

    modalities = ("image", "video")

    @cached_property
    def largest(self) -> Layout:
        """Found by search: since mosaics shrink, a partly filled canvas may give more tokens than any full one."""
        return max(map(self.layout, self._mosaics()), key=lambda layout: layout.tokens)

    def widths(self, model_config: ModelConfig) -> Widths:
        return replace(super().widths(model_config), projected=model_config.get_inputs_embeds_size())

    def video_shape(self, videos: Any, index: int, info: Any, kwargs: Mapping[str, object]) -> tuple[int, ...] | None:
        if info.get_hf_processor().video_processor.do_sample_frames or asks_for_frames(info, kwargs):
            return None
        return videos.get_num_frames(index), 0

    def of_video(self, reduction: Reduction) -> Reduction:
        """iLLaVA's authors use other tower layers for videos than for images (their README)."""
        reduction = super().of_video(reduction)
        if reduction.method != "illava" or dict(reduction.options).get("layers"):
            return reduction
        return replace(reduction, options=(*reduction.options, ("layers", _ILLAVA_VIDEO_LAYERS)))

    def base(self, shape: tuple[int, ...]) -> Layout | None:
        return None if _is_video(shape) else super().base(shape)

    def of_squares(self, shape: tuple[int, ...], side: int) -> Layout:
        if not _is_video(shape):
            return super().of_squares(shape, side)
        frame = self._grid(ceil(side / 2), ceil(side / 2))
        return Layout((Part(frame, shape[0], separators=1, can_join=True),), shape, self)

    @cached_property
    def shortest_video(self) -> Layout:
        return self.layout((1, 0))

    def grids(self, model: Any, inputs: Mapping[str, Any], plans: Sequence[ItemPlan]) -> list[list[Tensor]]:
        if PIXEL_FIELDS["video"] not in inputs:
            return super().grids(model, inputs, plans)
        pixels, lengths = self._pixels(model, inputs, plans)
        pooled = [_pooled(frames) for frames in self._features(model, pixels, lengths, plans)]
        counts = [plan.laid_out.parts[0].count for plan in plans]
        return [[video.reshape(n, -1, video.shape[-1])] for video, n in zip(pooled, counts, strict=True)]

    def regions(self, plan: ItemPlan, modality: Modality, size: tuple[int, int], info: Any) -> list[Region]:
        """Plans that act in the tower are shown on the tower's grid, before frames are pooled or mosaics shrink."""
        if modality == "image":
            return super().regions(plan, modality, size, info)
        grid, own = sides(plan.layout.parts[0].geometry), plan.grids[0]
        if plan.tile is not None and not plan.tile.is_identity:
            grid, own = (self._side, self._side), plan.tile
        return [Region(f"frame {i + 1}", *grid, WHOLE, own) for i in range(plan.layout.shape[0])]

    def _pixels(self, model: Any, inputs: Mapping[str, Any], plans: Sequence[ItemPlan]) -> tuple[Tensor, list[int]]:
        if PIXEL_FIELDS["video"] not in inputs:
            return super()._pixels(model, inputs, plans)
        videos = list(model._parse_and_validate_video_input(**inputs)[PIXEL_FIELDS["video"]])
        return torch.cat(videos), [len(frames) for frames in videos]

    def project(self, model: Any, features: Sequence[Tensor]) -> Sequence[Tensor]:
        return features  # projected already

    def _grid(self, rows: int, columns: int) -> VisionGeometry:
        return grid_geometry(rows, columns)  # projected tokens: the tower's are not shown

    def _features(self, model: Any, tiles: Tensor, counts: list[int], plans: Sequence[ItemPlan]) -> Sequence[Tensor]:
        return [model.multi_modal_projector(item) for item in super()._features(model, tiles, counts, plans)]

    def _mosaic_grid(self, shape: tuple[int, ...], side: int) -> tuple[int, int]:
        rows, columns = super()._mosaic_grid(shape, side)
        factor = sqrt(rows * columns / (_MOST_TILES * side**2))
        return (int(rows // factor), int(columns // factor)) if factor > 1.1 else (rows, columns)

    def _laid_out(self, tiles: Tensor, shape: tuple[int, ...]) -> Tensor:
        side = isqrt(tiles.shape[1])
        whole, shrunk = super()._mosaic_grid(shape, side), self._mosaic_grid(shape, side)
        mosaic = super()._laid_out(tiles, shape)
        return mosaic if shrunk == whole else _resized(mosaic[None], whole, shrunk)[0]

    def _mosaics(self) -> Iterator[tuple[int, int]]:
        """An image's (height, width) for every mosaic that a canvas may hold after padding is cut off."""
        for height, width in self._pinpoints:
            yield height, width
            rows, columns = height // self._tile_pixels * self._side, width // self._tile_pixels * self._side
            yield from ((round((left + 0.5) * width / columns), width) for left in range(rows % 2 or 2, rows, 2))
            yield from ((height, round((left + 0.5) * height / rows)) for left in range(columns % 2 or 2, columns, 2))


def _is_video(shape: tuple[int, ...]) -> bool:
    return shape[1] == 0


def _pooled(frames: Tensor) -> Tensor:
    """Square (frames, n, C) -> the same with half the side, rounded up."""
    side = isqrt(frames.shape[1])
    return _resized(frames, (side, side), (ceil(side / 2), ceil(side / 2)))


def _resized(x: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """(B, rows * columns, C) -> the same on another grid, interpolated as in vLLM."""
    return F.interpolate(x.mT.reshape(len(x), -1, *grid), wanted, mode="bilinear").flatten(2).mT


class FoldLlavaOnevisionProcessingInfo(LlavaOnevisionProcessingInfo):
    """Modification: the image with the most tokens. For published checkpoints it has 8765; vLLM's has 8748."""

    def get_image_size_with_most_features(self) -> ImageSize:
        family = family_of(self.ctx.model_config)
        if family is None:
            return super().get_image_size_with_most_features()
        height, width = family.largest.shape
        return ImageSize(width=width, height=height)


class FoldLlavaOnevisionMultiModalProcessor(ImageTokens, LlavaOnevisionMultiModalProcessor):
    """Modification beside `ImageTokens`': images and videos are processed apart, so that images stay bytes."""

    def _processed(
        self,
        mm_items: MultiModalDataItems,
        planned: Mapping[Modality, Sequence[ItemPlan]],
        hf_kwargs: Mapping[str, object],
    ) -> BatchFeature:
        found = BatchFeature()
        for modality, items in mm_items.items():
            own = MultiModalDataItems({modality: items})
            if modality == "image":
                found.update(BaseMultiModalProcessor._apply_hf_processor_main(self, own, hf_kwargs))
            else:
                found.update(super()._processed(own, planned, hf_kwargs))
        return found


@MULTIMODAL_REGISTRY.register_processor(
    FoldLlavaOnevisionMultiModalProcessor,
    info=FoldLlavaOnevisionProcessingInfo,
    dummy_inputs=LlavaOnevisionDummyInputsBuilder,
)
class FoldLlavaOnevisionForConditionalGeneration(FoldModel, LlavaOnevisionForConditionalGeneration):
    """Modification beside `FoldModel`'s: videos of different lengths may share a step.

    vLLM returns these as (1, n, hidden), but its runner needs (n, hidden) and would end the engine.
    """

    def _process_video_pixels(self, inputs: Any) -> Any:
        return [video.flatten(0, -2) for video in super()._process_video_pixels(inputs)]
