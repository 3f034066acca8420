"""InternVL 2 to 3.5: an image is cut into tiles, behind which the whole image comes as one more.

Tiles are reduced one by one, as the decoder gets them: after the pixel shuffle, which makes one token of 2 x 2 patches,
and the projector. Each frame of a video is a tile. OpenGVLab's layout here, Hugging Face's in `internvl_hf`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import BatchFeature
from vllm.config import ModelConfig
from vllm.model_executor.models.internvl import (
    InternVLChatModel,
    InternVLDummyInputsBuilder,
    InternVLMultiModalProcessor,
    InternVLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageSize, MultiModalDataItems
from vllm.transformers_utils.processors.internvl import InternVLVideoProcessor

from foldserve.kernels.warm_up import Widths
from foldserve.reducers.geometry import Stage, VisionGeometry
from foldserve.reducers.item import ItemPlan, Layout, Part
from foldserve.reducers.reduction import Reduction
from foldserve.server.engine.family import FRAME_OPTIONS, EqualGridsFamily, Modality, refuse_choice_in_pieces
from foldserve.server.engine.model import FoldModel
from foldserve.server.engine.processor import ShortenedRuns
from foldserve.server.engine.vision import rows


class InternVLFamily(EqualGridsFamily):
    """`Layout.shape` is (tiles,); a video has one for each frame, and text between them."""

    modalities = ("image", "video")
    shape_ints = 1
    sends_bytes = False  # vLLM normalizes each tile as it cuts it
    media_tokens: Mapping[Modality, str] = MappingProxyType({"image": "<IMG_CONTEXT>", "video": "<|video_pad|>"})
    pixel_fields: ClassVar[Mapping[Modality, str]] = {"image": "pixel_values_flat", "video": "pixel_values_flat_video"}

    def __init__(self, model_config: ModelConfig, side: int) -> None:
        """`side` of a tile, in tokens."""
        self._model_config = model_config
        self._tile = VisionGeometry(side**2, (side, side), stages=frozenset({Stage.AFTER_TOWER, Stage.DECODER}))

    @classmethod
    def of(cls, model_config: ModelConfig) -> InternVLFamily | None:
        vision = model_config.hf_config.vision_config
        height, width = _pair(vision.image_size)
        side = height // _pair(vision.patch_size)[0] * model_config.hf_config.downsample_ratio
        return cls(model_config, int(side)) if height == width and side == int(side) else None

    @cached_property
    def largest(self) -> Layout:
        info = MULTIMODAL_REGISTRY.get_processing_info(self._model_config)
        return self.layout((self.tiles(info, info.get_image_size_with_most_features(), {}),))

    def tiles(self, info: Any, size: ImageSize, kwargs: Mapping[str, object]) -> int:
        """By vLLM's formula; the operator's and the request's `max_dynamic_patch` are part of it."""
        processor = info.get_hf_processor(**kwargs)
        tokens = info.get_num_image_tokens(image_width=size.width, image_height=size.height, processor=processor)
        return int(tokens // processor.image_seq_length)

    def shape(self, images: Any, index: int, info: Any, kwargs: Mapping[str, object]) -> tuple[int, ...]:
        return (self.tiles(info, images.get_image_size(index), kwargs),)

    def video_shape(self, videos: Any, index: int, info: Any, kwargs: Mapping[str, object]) -> tuple[int, ...] | None:
        asked = info.ctx.get_merged_mm_kwargs(kwargs)
        if {*asked, *asked.get("videos_kwargs", ())} & FRAME_OPTIONS:
            return None
        return (videos.get_num_frames(index),)

    def of_video(self, reduction: Reduction) -> Reduction:
        refuse_choice_in_pieces(reduction)
        return reduction

    def layout(self, shape: tuple[int, ...]) -> Layout:
        return Layout((Part(self._tile, count=shape[0]),), shape)

    def widths(self, model_config: ModelConfig) -> Widths:
        vision = model_config.hf_config.vision_config
        return Widths(model_config.get_inputs_embeds_size(), vision.hidden_size // vision.num_attention_heads)

    def pixels(self, processed: Mapping[str, Any], modality: Modality) -> Sequence[Tensor]:
        counts = processed[f"{modality}_num_patches"].tolist()  # vLLM's patches are tiles
        pixels: Tensor = processed[self.pixel_fields[modality]]
        return [pixels[first:last] for first, last in pairwise(accumulate(counts, initial=0))]

    def select(self, inputs: Mapping[str, Any], places: Sequence[int]) -> dict[str, Any]:
        modality: Modality = "image" if self.pixel_fields["image"] in inputs else "video"
        pixels = self.pixels(inputs, modality)
        counts = {f"{modality}_num_patches": rows(inputs[f"{modality}_num_patches"], places)}
        return {**inputs, **counts, self.pixel_fields[modality]: torch.cat([pixels[i] for i in places])}


class InternVLImages(ShortenedRuns):
    """Modification beside those of `ShortenedRuns`: an image that comes out with other tiles than planned is refused.

    Plans are made of its size alone, before it is cut.
    """

    def _processed(
        self,
        mm_items: MultiModalDataItems,
        planned: Mapping[Modality, Sequence[ItemPlan]],
        hf_kwargs: Mapping[str, object],
    ) -> BatchFeature:
        processed = super()._processed(mm_items, planned, hf_kwargs)
        for modality, plans in planned.items():
            found, expected = processed[f"{modality}_num_patches"].tolist(), [plan.layout.shape[0] for plan in plans]
            if found != expected:
                raise RuntimeError(f"{modality}s of {expected} tiles by their size came out with {found}")
        return processed


class ImageOptionsInfo(InternVLProcessingInfo):
    """Modification: options for images, such as the number of tiles, no longer fail in the video part."""

    def get_video_processor(self, **kwargs: object) -> InternVLVideoProcessor:
        asked = self.ctx.get_merged_mm_kwargs(kwargs)
        return InternVLVideoProcessor(asked.get("image_size", self.get_hf_config().vision_config.image_size))


class FoldInternVLMultiModalProcessor(InternVLImages, InternVLMultiModalProcessor):
    """See `InternVLImages`."""


@MULTIMODAL_REGISTRY.register_processor(
    FoldInternVLMultiModalProcessor, info=ImageOptionsInfo, dummy_inputs=InternVLDummyInputsBuilder
)
class FoldInternVLChatModel(FoldModel, InternVLChatModel):
    """See `FoldModel`."""


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a config: one number in OpenGVLab's, two in Hugging Face's."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
