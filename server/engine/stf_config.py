"""What a LLaVA-STF checkpoint's config says: its projector, and the geometry that follows from it."""

from __future__ import annotations

from functools import lru_cache
from math import isqrt

from transformers import CLIPVisionConfig, PretrainedConfig

from foldserve.reducers.geometry import Stage, VisionGeometry
from foldserve.reducers.stf import Stf, StfConfig

ARCHITECTURE = "LlavaStfForConditionalGeneration"


def stf_config(hf_config: PretrainedConfig) -> StfConfig:
    """The checked object `stf` of config.json.

    Raises:
        ValueError: it is missing or wrong, or does not fit the vision tower.
    """
    vision, strategy = hf_config.vision_config, hf_config.vision_feature_select_strategy
    if not isinstance(vision, CLIPVisionConfig):
        raise ValueError(f"{ARCHITECTURE} needs a CLIP vision tower, not {vision.model_type!r}")
    if strategy != "default":
        raise ValueError(
            f"{ARCHITECTURE} drops CLIP's class token: vision_feature_select_strategy must be 'default', not "
            f"{strategy!r}"
        )
    config = StfConfig.parse(getattr(hf_config, "stf", None))
    config.check(blocks=vision.num_hidden_layers, channels=vision.hidden_size, patches=_patches(vision))
    return config


def stf_geometry(hf_config: PretrainedConfig) -> VisionGeometry:
    """Geometry of the projector's output: nothing may go before it, since it takes windows of the grid.

    Raises:
        ValueError: as `stf_config`.
    """
    return _geometry(stf_config(hf_config), _patches(hf_config.vision_config))


@lru_cache(maxsize=64)  # one object per model, which the plans' caches are keyed by
def _geometry(config: StfConfig, patches: int) -> VisionGeometry:
    tokens = config.tokens(patches)
    side = isqrt(tokens)
    return VisionGeometry(
        tokens,
        grid=(side, side) if config.experts == 1 else None,  # several tokens of one window lie in a row
        stages=frozenset({Stage.PROJECTOR, Stage.AFTER_TOWER, Stage.DECODER}),
        projector=Stf.name,
    )


def _patches(vision: CLIPVisionConfig) -> int:
    return (vision.image_size // vision.patch_size) ** 2
