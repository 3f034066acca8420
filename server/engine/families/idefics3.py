"""Idefics3 and SmolVLM: an image is cut into tiles, followed by the whole image as one more tile.

A mark such as `<row_1_col_2>` before each tile splits an image's tokens in the prompt; marks are never removed. A token
is made of `scale_factor` x `scale_factor` patches, in raster order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from vllm.config import ModelConfig
from vllm.model_executor.models.idefics3 import (
    Idefics3DummyInputsBuilder,
    Idefics3ForConditionalGeneration,
    Idefics3MultiModalProcessor,
    Idefics3ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageSize

from foldserve.reducers.item import Layout
from foldserve.reducers.reduction import Reduction
from foldserve.server.engine.families.tiles import TiledImages, TilesFamily
from foldserve.server.engine.family import Modality, refuse_choice_in_pieces
from foldserve.server.engine.model import FoldModel


class Idefics3Family(TilesFamily):
    """See `TilesFamily`."""

    tile_fields: ClassVar[Mapping[Modality, tuple[str, ...]]] = {"image": ("pixel_values", "pixel_attention_mask")}

    @classmethod
    def of(cls, model_config: ModelConfig) -> Idefics3Family:
        vision = model_config.hf_config.vision_config
        return cls(model_config, vision.image_size // vision.patch_size // model_config.hf_config.scale_factor)

    def tiles(self, info: Any, size: ImageSize, kwargs: Mapping[str, object]) -> int:
        count: int = info.get_num_patches(
            image_width=size.width,
            image_height=size.height,
            processor=info.get_hf_processor(**kwargs),
            mm_kwargs=kwargs,
        )
        return count

    def tile_grid(self, info: Any, size: tuple[int, int], count: int) -> tuple[int, int]:
        _, down, across = info._get_image_feature_grid_size(
            image_width=size[0], image_height=size[1], processor=info.get_hf_processor(), mm_kwargs={}
        )
        return (down, across) if down * across == count else super().tile_grid(info, size, count)

    def largest_size(self, info: Any) -> ImageSize:
        return ImageSize(1, 1)  # the processor first scales every image to the same longer side

    def of_image(self, reduction: Reduction, layout: Layout) -> Reduction:
        reduction = super().of_image(reduction, layout)
        if layout.parts[0].count > 1:
            refuse_choice_in_pieces(reduction, "an image's tiles")
        return reduction


class FoldIdefics3MultiModalProcessor(TiledImages, Idefics3MultiModalProcessor):
    """See `TiledImages`."""


class Idefics3Model(FoldModel):
    """Modification beside those of `FoldModel`: the path of the decoder."""

    decoder_path = "model.text_model"


@MULTIMODAL_REGISTRY.register_processor(
    FoldIdefics3MultiModalProcessor, info=Idefics3ProcessingInfo, dummy_inputs=Idefics3DummyInputsBuilder
)
class FoldIdefics3ForConditionalGeneration(Idefics3Model, Idefics3ForConditionalGeneration):
    """See `Idefics3Model`."""
