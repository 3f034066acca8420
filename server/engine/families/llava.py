"""LLaVA-1.5: one image size, one grid of tokens from a CLIP or SigLIP tower, a projector per token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from math import isqrt
from typing import Any

from torch import Tensor
from transformers import CLIPVisionConfig, PretrainedConfig, SiglipVisionConfig
from vllm.config import ModelConfig
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
    _build_llava_or_pixtral_hf_info,
    _build_llava_or_pixtral_hf_processor,
)
from vllm.model_executor.models.vision import get_num_selected_vision_tokens, get_vision_encoder_info
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdate,
)

from foldserve.reducers.geometry import Stage, VisionGeometry
from foldserve.reducers.item import ItemPlan, Layout
from foldserve.server.engine.family import Family
from foldserve.server.engine.model import FoldModel
from foldserve.server.engine.processor import FoldProcessor, without_own_options
from foldserve.server.engine.regions import Box, visible_box
from foldserve.server.engine.vision import KeptTokens, encode_images, project_together, reduce_features


class LlavaFamily(Family):
    """Pixtral checkpoints, which name the same architecture, are not reduced."""

    is_capturable = True

    def __init__(self, geometry: VisionGeometry, select_strategy: str) -> None:
        self.largest = Layout.single(geometry)
        self._select_strategy = select_strategy

    @classmethod
    def of(cls, model_config: ModelConfig) -> LlavaFamily | None:
        hf_config = model_config.hf_config
        geometry = geometry_of(hf_config)
        if geometry is None:
            return None
        takes_cells = Stage.BEFORE_TOWER in geometry.stages
        return cls(replace(geometry, takes_cells=takes_cells), hf_config.vision_feature_select_strategy)

    def encode(
        self, model: Any, inputs: Mapping[str, Any], plans: Sequence[ItemPlan], queries: Sequence[Tensor] = ()
    ) -> Sequence[KeptTokens]:
        grids = [plan.grids[0] for plan in plans]
        cells = [plan.cells for plan in plans]
        images = encode_images(model.vision_tower, checked_pixels(model, inputs), grids, self._select_strategy, cells)
        return reduce_features(images, grids, partial(project_together, model.multi_modal_projector), queries=queries)

    def kept_grids(
        self, model: Any, inputs: Mapping[str, Any], plan: ItemPlan, queries: Sequence[Tensor] = ()
    ) -> Sequence[KeptTokens]:
        return self.encode(model, inputs, [plan], queries)

    def box(self, size: tuple[int, int], info: Any) -> Box:
        return visible_box(info.get_hf_processor().image_processor, size)

    def cells(self, pixels: Tensor, layout: Layout) -> Tensor:
        geometry = layout.parts[0].geometry
        assert geometry.grid is not None  # see `of`
        patch = pixels.shape[-1] // geometry.grid[1]
        return pixels.unfold(1, patch, patch).unfold(2, patch, patch).permute(1, 2, 0, 3, 4).flatten(2)


def checked_pixels(model: LlavaForConditionalGeneration, inputs: Mapping[str, Any]) -> Tensor:
    """(B, 3, H, W), checked by vLLM's own model."""
    image_input = model._parse_and_validate_image_input(**inputs)
    assert image_input is not None and image_input["type"] == "pixel_values"
    pixels: Tensor = image_input["pixel_values"]
    return pixels


class ImageTokens(FoldProcessor):
    """Modification beside `FoldProcessor`'s: `plan.kept` placeholders per image or video, in one piece."""

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        planned = self._all_plans(mm_items, hf_processor_mm_kwargs)
        stock = super()._get_prompt_updates(mm_items, without_own_options(hf_processor_mm_kwargs), out_mm_kwargs)
        return [_shortened(one, planned[one.modality]) if one.modality in planned else one for one in stock]


def _shortened(update: PromptUpdate, plans: Sequence[ItemPlan]) -> PromptUpdate:
    """vLLM's update, whose target is the placeholder, with `plan.kept` placeholders."""
    return PromptReplacement(update.modality, update.target, lambda i: [*update.target] * plans[i].kept)


class FoldLlavaMultiModalProcessor(ImageTokens, LlavaMultiModalProcessor):
    """See `ImageTokens`."""


def _build_processor(
    info: BaseProcessingInfo, dummy_inputs: BaseDummyInputsBuilder[BaseProcessingInfo]
) -> BaseMultiModalProcessor[BaseProcessingInfo]:
    """foldserve's for CLIP and SigLIP towers, vLLM's for Pixtral. Called per request, so it reads no config."""
    if isinstance(info, LlavaProcessingInfo):
        return FoldLlavaMultiModalProcessor(info, dummy_inputs)
    return _build_llava_or_pixtral_hf_processor(info, dummy_inputs)


@MULTIMODAL_REGISTRY.register_processor(
    _build_processor, info=_build_llava_or_pixtral_hf_info, dummy_inputs=LlavaDummyInputsBuilder
)
class FoldLlavaForConditionalGeneration(FoldModel, LlavaForConditionalGeneration):
    """See `FoldModel`."""


def geometry_of(hf_config: PretrainedConfig) -> VisionGeometry | None:
    """Geometry of one image or tile of a CLIP or SigLIP tower; None for other towers."""
    vision_config, strategy = hf_config.vision_config, hf_config.vision_feature_select_strategy
    if not isinstance(vision_config, CLIPVisionConfig | SiglipVisionConfig):
        return None
    encoder = get_vision_encoder_info(hf_config)
    side = encoder.get_image_size()
    tokens = get_num_selected_vision_tokens(encoder.get_num_image_tokens(image_width=side, image_height=side), strategy)
    layer = hf_config.vision_feature_layer
    stages = {Stage.AFTER_TOWER, Stage.DECODER}
    is_clip = isinstance(vision_config, CLIPVisionConfig)
    patches_only = strategy == ("default" if is_clip else "full")
    if patches_only and isinstance(layer, int):  # with several feature layers there is no single last layer
        stages |= {Stage.BEFORE_TOWER, Stage.IN_TOWER}
    return _geometry(
        tokens,
        layers=layer if isinstance(layer, int) and layer >= 0 else vision_config.num_hidden_layers + 1 + _last(layer),
        class_token=is_clip and patches_only,
        stages=frozenset(stages),
        is_grid=patches_only,
    )


@lru_cache(maxsize=64)  # one object per model, as the key of the plans' caches
def _geometry(
    tokens: int, *, layers: int, class_token: bool, stages: frozenset[Stage], is_grid: bool
) -> VisionGeometry:
    grid = (isqrt(tokens), isqrt(tokens)) if is_grid else None
    return VisionGeometry(tokens, grid, layers, class_token, stages, shows_tower=True)


def _last(layer: int | list[int]) -> int:
    return layer if isinstance(layer, int) else layer[-1]
