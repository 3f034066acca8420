"""The vision geometry of a checkpoint, read off its config."""

from __future__ import annotations

from functools import lru_cache
from math import isqrt

from transformers import CLIPVisionConfig, PretrainedConfig, SiglipVisionConfig
from vllm.model_executor.models.vision import get_num_selected_vision_tokens, get_vision_encoder_info

from foldserve.reducers.geometry import Stage, VisionGeometry
from foldserve.server.engine import stf_config


def vision_geometry(hf_config: PretrainedConfig) -> VisionGeometry | None:
    """Geometry of a LLaVA-1.5-like model (fixed image size), or None for any other model."""
    if stf_config.ARCHITECTURE in (hf_config.architectures or ()):
        return stf_config.stf_geometry(hf_config)
    if "LlavaForConditionalGeneration" not in (hf_config.architectures or ()):
        return None
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
    if patches_only and isinstance(layer, int):  # several feature layers have no one last layer to reduce in
        stages |= {Stage.BEFORE_TOWER, Stage.IN_TOWER}
    return _geometry(
        tokens,
        layers=layer if isinstance(layer, int) and layer >= 0 else vision_config.num_hidden_layers + 1 + _last(layer),
        class_token=is_clip and patches_only,
        stages=frozenset(stages),
        is_grid=patches_only,
    )


@lru_cache(maxsize=64)  # one object per model, which the plans' caches are keyed by
def _geometry(
    tokens: int, *, layers: int, class_token: bool, stages: frozenset[Stage], is_grid: bool
) -> VisionGeometry:
    grid = (isqrt(tokens), isqrt(tokens)) if is_grid else None
    return VisionGeometry(tokens, grid, layers, class_token, stages)


def _last(layer: int | list[int]) -> int:
    return layer if isinstance(layer, int) else layer[-1]
