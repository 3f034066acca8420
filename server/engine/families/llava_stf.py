"""LLaVA-STF in vLLM: LLaVA-1.5 with another projector, whose output may be reduced further."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import isqrt
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig, PretrainedConfig
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder, LlavaProcessingInfo
from vllm.model_executor.models.utils import maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY

from foldserve.reducers.geometry import Stage, VisionGeometry
from foldserve.reducers.item import ItemPlan, Layout
from foldserve.reducers.stf import Stf, StfConfig, StfProjector
from foldserve.server.engine.families.llava import (
    FoldLlavaForConditionalGeneration,
    FoldLlavaMultiModalProcessor,
    checked_pixels,
)
from foldserve.server.engine.family import AfterTowerFamily
from foldserve.server.engine.regions import Box, visible_box
from foldserve.server.engine.vision import KeptTokens

ARCHITECTURE = "LlavaStfForConditionalGeneration"


class StfFamily(AfterTowerFamily):
    """Reductions work on the projector's output, one grid."""

    def __init__(self, geometry: VisionGeometry) -> None:
        self.largest = Layout.single(geometry)

    @classmethod
    def of(cls, model_config: ModelConfig) -> StfFamily:
        return cls(stf_geometry(model_config.hf_config))

    def grids(self, model: Any, inputs: Mapping[str, Any], plans: Sequence[ItemPlan]) -> list[list[torch.Tensor]]:
        features = model._image_pixels_to_features(model.vision_tower, checked_pixels(model, inputs))
        return [[image[None]] for image in model.multi_modal_projector(features)]

    def pack(self, model: Any, grids: Sequence[KeptTokens], plan: ItemPlan) -> KeptTokens:
        (image,) = grids
        return image

    def box(self, size: tuple[int, int], info: Any) -> Box:
        return visible_box(info.get_hf_processor().image_processor, size)


class StfProcessingInfo(LlavaProcessingInfo):
    """Modification to vLLM's LLaVA: the number of tokens after the projector."""

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        return stf_geometry(self.get_hf_config()).tokens


class ParallelMlp(nn.Module):
    """`plain_mlp` under tensor parallelism: the inner width is split over the ranks."""

    def __init__(
        self, width: int, inner: int, out: int, *, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        self.linear_1 = ColumnParallelLinear(width, inner, quant_config=quant_config, prefix=f"{prefix}.linear_1")
        self.act = nn.GELU()
        self.linear_2 = RowParallelLinear(inner, out, quant_config=quant_config, prefix=f"{prefix}.linear_2")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., width) -> (..., out), whole on every rank."""
        inner, _ = self.linear_1(x)
        projected, _ = self.linear_2(self.act(inner))
        return projected


@MULTIMODAL_REGISTRY.register_processor(
    FoldLlavaMultiModalProcessor, info=StfProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class FoldLlavaStfForConditionalGeneration(FoldLlavaForConditionalGeneration):
    """Modifications to foldserve's LLaVA:

    - the tower returns the hidden states of several blocks, joined on the channels;
    - the projector is LLaVA-STF's.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        stf = stf_config(config)
        config.vision_feature_layer = list(stf.layers)  # the tower is built up to the deepest of them
        super().__init__(vllm_config=vllm_config, prefix=prefix)

        def mlp(name: str, width: int, inner: int, out: int) -> nn.Module:
            path = maybe_prefix(prefix, f"multi_modal_projector.{name}")
            return ParallelMlp(width, inner, out, quant_config=vllm_config.quant_config, prefix=path)

        with self._mark_tower_model(vllm_config, "image"):
            self.multi_modal_projector = StfProjector(
                stf, config.vision_config.hidden_size, config.text_config.hidden_size, mlp
            )

    def _image_pixels_to_features(self, vision_tower: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, patches, layers * C)."""
        return vision_tower(
            pixel_values, select_layers=self.config.vision_feature_layer, feature_select_strategy="default"
        )


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
    """Geometry of the projector's output. It needs the whole grid, so nothing can be removed before it.

    Raises:
        ValueError: as `stf_config`.
    """
    return _geometry(stf_config(hf_config), _patches(hf_config.vision_config))


@lru_cache(maxsize=64)  # one object per model, as the key of the plans' caches
def _geometry(config: StfConfig, patches: int) -> VisionGeometry:
    tokens = config.tokens(patches)
    side = isqrt(tokens)
    return VisionGeometry(
        tokens,
        grid=(side, side) if config.experts == 1 else None,  # a window's tokens are adjacent
        stages=frozenset({Stage.PROJECTOR, Stage.AFTER_TOWER, Stage.DECODER}),
        projector=Stf.name,
    )


def _patches(vision: CLIPVisionConfig) -> int:
    return (vision.image_size // vision.patch_size) ** 2
