"""InternVL in Hugging Face's format (`OpenGVLab/InternVL3-8B-hf`), which vLLM implements in its Intern-S1 module."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from transformers import InternVLProcessor
from vllm.model_executor.models.interns1 import (
    InternS1DummyInputsBuilder,
    InternS1ForConditionalGeneration,
    InternS1MultiModalProcessor,
    InternS1ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageSize

from foldserve.server.engine.families.internvl import InternVLFamily
from foldserve.server.engine.families.tiles import TiledImages
from foldserve.server.engine.family import Modality
from foldserve.server.engine.model import FoldModel


class InternVLHFFamily(InternVLFamily):
    """Modifications: names of fields; the video processor may choose frames."""

    media_tokens: Mapping[Modality, str] = MappingProxyType({"video": "<video>"})
    tile_fields: ClassVar[Mapping[Modality, tuple[str, ...]]] = {
        "image": ("pixel_values",),
        "video": ("pixel_values_videos",),
    }

    def tiles(self, info: Any, size: ImageSize, kwargs: Mapping[str, object]) -> int:
        processor = info.get_hf_processor(**kwargs)
        tokens = info.get_num_image_tokens(
            image_width=size.width, image_height=size.height, processor=processor, mm_kwargs=kwargs
        )
        return int(tokens // processor.image_seq_length)

    def video_shape(self, videos: Any, index: int, info: Any, kwargs: Mapping[str, object]) -> tuple[int, ...] | None:
        chosen_later = info.get_hf_processor().video_processor.do_sample_frames
        return None if chosen_later else super().video_shape(videos, index, info, kwargs)


class TilingInfo(InternS1ProcessingInfo):
    """Modification: counts tiles unless a request or the operator turns tiling off.

    Hugging Face's `InternVLProcessor` turns tiling on, but its image processor, which vLLM asks, has it off by default.
    vLLM may then measure memory with a single tile as the largest image.
    """

    def get_num_image_tokens(
        self, *, image_width: int, image_height: int, processor: InternVLProcessor, mm_kwargs: Mapping[str, object]
    ) -> int:
        asked = {"crop_to_patches": True, **self.ctx.get_merged_mm_kwargs(mm_kwargs)}
        asked |= asked.get("images_kwargs", {})
        tiles: int = processor.image_processor.get_number_of_image_patches(image_height, image_width, asked)
        return tiles * int(processor.image_seq_length)


class FoldInternVLMultiModalProcessor(TiledImages, InternS1MultiModalProcessor):
    """See `TiledImages`."""


@MULTIMODAL_REGISTRY.register_processor(
    FoldInternVLMultiModalProcessor, info=TilingInfo, dummy_inputs=InternS1DummyInputsBuilder
)
class FoldInternVLForConditionalGeneration(FoldModel, InternS1ForConditionalGeneration):
    """See `FoldModel`."""
