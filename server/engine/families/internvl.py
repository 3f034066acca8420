"""InternVL 2 to 3.5: an image is cut into tiles, followed by the whole image as one more tile.

Tiles are reduced one by one after the pixel shuffle, which makes one token of 2 x 2 patches, and the projector. Each
frame of a video is a tile. This file is for checkpoints in OpenGVLab's format, `internvl_hf` for Hugging Face's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import ModelConfig
from vllm.model_executor.models.internvl import (
    InternVLChatModel,
    InternVLDummyInputsBuilder,
    InternVLMultiModalProcessor,
    InternVLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageSize

from foldserve.reducers.geometry import VisionGeometry
from foldserve.reducers.item import ItemPlan, Layout, Part
from foldserve.reducers.reduction import Reduction
from foldserve.server.engine.families.tiles import TiledImages, TilesFamily
from foldserve.server.engine.family import FRAME_OPTIONS, Modality, refuse_choice_in_pieces
from foldserve.server.engine.model import FoldModel
from foldserve.server.engine.moved import InternVLChatVideoProcessor
from foldserve.server.engine.vision import KeptTokens


class InternVLFamily(TilesFamily):
    """A video has a tile per frame, with text between frames."""

    modalities = ("image", "video")
    media_tokens: Mapping[Modality, str] = MappingProxyType({"image": "<IMG_CONTEXT>", "video": "<|video_pad|>"})
    counts: ClassVar[Mapping[Modality, str]] = {"image": "image_num_patches", "video": "video_num_patches"}
    tile_fields: ClassVar[Mapping[Modality, tuple[str, ...]]] = {
        "image": ("pixel_values_flat",),
        "video": ("pixel_values_flat_video",),
    }

    @classmethod
    def of(cls, model_config: ModelConfig) -> InternVLFamily | None:
        vision = model_config.hf_config.vision_config
        height, width = _pair(vision.image_size)
        side = height // _pair(vision.patch_size)[0] * model_config.hf_config.downsample_ratio
        return cls(model_config, int(side)) if height == width and side == int(side) else None

    def largest_size(self, info: Any) -> ImageSize:
        size: ImageSize = info.get_image_size_with_most_features()
        return size

    def tiles(self, info: Any, size: ImageSize, kwargs: Mapping[str, object]) -> int:
        """By vLLM's formula, which uses the operator's and the request's `max_dynamic_patch`."""
        processor = info.get_hf_processor(**kwargs)
        tokens = info.get_num_image_tokens(image_width=size.width, image_height=size.height, processor=processor)
        return int(tokens // processor.image_seq_length)

    def video_shape(self, videos: Any, index: int, info: Any, kwargs: Mapping[str, object]) -> tuple[int, ...] | None:
        asked = info.ctx.get_merged_mm_kwargs(kwargs)
        if {*asked, *asked.get("videos_kwargs", ())} & FRAME_OPTIONS:
            return None
        return (videos.get_num_frames(index),)

    def of_video(self, reduction: Reduction) -> Reduction:
        refuse_choice_in_pieces(reduction)
        return super().of_video(reduction)

    def layout(self, shape: tuple[int, ...]) -> Layout:
        return replace(super().layout(shape), tiling=self)

    @cached_property
    def tile(self) -> VisionGeometry:
        return replace(self._tile, any_resolution=True)

    def base(self, shape: tuple[int, ...]) -> Layout:
        return Layout((Part(self._tile),), shape, self)

    def of_squares(self, shape: tuple[int, ...], side: int) -> Layout:
        raise NotImplementedError  # no stage of these models works on tiles before they are laid out

    def grids(self, model: Any, inputs: Mapping[str, Any], plans: Sequence[ItemPlan]) -> list[list[Tensor]]:
        if any(plan.base_only for plan in plans):
            (name,) = self.tile_fields["image"]
            tiles = zip(self.pixels(inputs, "image"), plans, strict=True)
            needed = [own[-1:] if plan.base_only else own for own, plan in tiles]
            inputs = {**inputs, name: torch.cat(needed), self.counts["image"]: torch.tensor([*map(len, needed)])}
        return super().grids(model, inputs, plans)

    def pack(self, model: Any, grids: Sequence[KeptTokens], plan: ItemPlan) -> KeptTokens:
        packed = super().pack(model, grids, plan)
        return packed._replace(source=packed.source + plan.encoded - plan.laid_out.tokens)  # the base tile is the last


class ImageOptionsInfo(InternVLProcessingInfo):
    """Modification: image options, such as the number of tiles, no longer fail in the video processor."""

    def get_video_processor(self, **kwargs: object) -> InternVLChatVideoProcessor:
        asked = self.ctx.get_merged_mm_kwargs(kwargs)
        return InternVLChatVideoProcessor(asked.get("image_size", self.get_hf_config().vision_config.image_size))


class FoldInternVLMultiModalProcessor(TiledImages, InternVLMultiModalProcessor):
    """See `TiledImages`."""


@MULTIMODAL_REGISTRY.register_processor(
    FoldInternVLMultiModalProcessor, info=ImageOptionsInfo, dummy_inputs=InternVLDummyInputsBuilder
)
class FoldInternVLChatModel(FoldModel, InternVLChatModel):
    """See `FoldModel`."""


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width); configs have one number in OpenGVLab's format, two in Hugging Face's."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
