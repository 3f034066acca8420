"""Gemma-3: 64 x 64 patches of an image and of each crop, averaged to 16 x 16 tokens.

Crops are off by default (`do_pan_and_scan`). Image tokens attend to each other in both directions; vLLM finds them by
the prompt's placeholders, so reduced images need no change there.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

from vllm.config import ModelConfig
from vllm.model_executor.models.gemma3_mm import (
    Gemma3DummyInputsBuilder,
    Gemma3ForConditionalGeneration,
    Gemma3MultiModalProcessor,
    Gemma3ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageSize

from foldserve.reducers.geometry import Stage
from foldserve.server.engine.families.tiles import TiledImages, TilesFamily
from foldserve.server.engine.model import FoldModel


class Gemma3Family(TilesFamily):
    """Tiles are the whole image, then its crops."""

    stages = frozenset({Stage.AFTER_TOWER})
    decoder_refusal = (
        "where this model's image tokens attend to each other in both directions and most layers see a window of tokens"
    )
    base_is_last = False

    @classmethod
    def of(cls, model_config: ModelConfig) -> Gemma3Family:
        tokens = model_config.hf_config.mm_tokens_per_image
        if isqrt(tokens) ** 2 != tokens:
            raise ValueError(f"mm_tokens_per_image of the config is {tokens}, which is not a square")
        return cls(model_config, isqrt(tokens))

    def tiles(self, info: Any, size: ImageSize, kwargs: Mapping[str, object]) -> int:
        crops: int = info.get_num_crops(
            image_width=size.width,
            image_height=size.height,
            processor=info.get_hf_processor(**kwargs),
            mm_kwargs=kwargs,
        )
        return 1 + crops

    def tile_grid(self, info: Any, size: tuple[int, int], count: int) -> tuple[int, int]:
        return (1, count) if size[0] >= size[1] else (count, 1)

    def largest_size(self, info: Any) -> ImageSize:
        size: ImageSize = info.get_image_size_with_most_features()
        return size


class FoldGemma3MultiModalProcessor(TiledImages, Gemma3MultiModalProcessor):
    """See `TiledImages`."""


@MULTIMODAL_REGISTRY.register_processor(
    FoldGemma3MultiModalProcessor, info=Gemma3ProcessingInfo, dummy_inputs=Gemma3DummyInputsBuilder
)
class FoldGemma3ForConditionalGeneration(FoldModel, Gemma3ForConditionalGeneration):
    """See `FoldModel`."""
