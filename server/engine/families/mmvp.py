"""MMVP's LLaVA in vLLM: at each place of an image a CLIP token, then a DINOv2 token, each with its own projector.

This is the interleaved mixture of features of "Eyes Wide Shut? Exploring the Visual Shortcomings of Multimodal LLMs".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, Dinov2Config, Dinov2Model, PretrainedConfig
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProjector,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import WeightsMapper, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY

from foldserve.reducers.geometry import Stage, VisionGeometry
from foldserve.reducers.item import ItemPlan, Layout, Part
from foldserve.server.engine.families.llava import (
    FoldLlavaForConditionalGeneration,
    FoldLlavaMultiModalProcessor,
    checked_pixels,
)
from foldserve.server.engine.family import AfterTowerFamily, Modality
from foldserve.server.engine.regions import Box, Region, visible_box
from foldserve.server.engine.vision import KeptTokens, project_together

ARCHITECTURE = "MmvpForConditionalGeneration"
TOWERS = 2


class MmvpFamily(AfterTowerFamily):
    """An image is two grids, CLIP's and DINOv2's, reduced separately: features of two towers can't be compared."""

    def __init__(self, geometry: VisionGeometry) -> None:
        self.largest = Layout((Part(geometry, count=TOWERS),))

    @classmethod
    def of(cls, model_config: ModelConfig) -> MmvpFamily:
        return cls(mmvp_geometry(model_config.hf_config))

    def grids(self, model: Any, inputs: Mapping[str, Any], plans: Sequence[ItemPlan]) -> list[list[Tensor]]:
        features = model._image_pixels_to_features(model.vision_tower, checked_pixels(model, inputs))
        return [[image] for image in features]

    def project(self, model: Any, features: Sequence[Tensor]) -> Sequence[Tensor]:
        projector: InterleavingProjector = model.multi_modal_projector
        clip = project_together(projector.clip, features[::TOWERS])
        dino = project_together(projector.dino, features[1::TOWERS])
        return [own for image in zip(clip, dino, strict=True) for own in image]

    def pack(self, model: Any, grids: Sequence[KeptTokens], plan: ItemPlan) -> KeptTokens:
        """Sorted by place, CLIP's token first. Only the device knows which tokens are left, so it sorts."""
        clip, dino = grids
        features = torch.cat([clip.features, dino.features])
        source, order = torch.cat([TOWERS * clip.source, TOWERS * dino.source + 1]).sort()
        return KeptTokens(features[order], source)

    def regions(self, plan: ItemPlan, modality: Modality, size: tuple[int, int], info: Any) -> list[Region]:
        each = zip(("CLIP", "DINOv2"), super().regions(plan, modality, size, info), strict=True)
        return [region._replace(name=name) for name, region in each]

    def box(self, size: tuple[int, int], info: Any) -> Box:
        return visible_box(info.get_hf_processor().image_processor, size)


class MmvpProcessingInfo(LlavaProcessingInfo):
    """Modification to vLLM's LLaVA: each place has a token from each tower."""

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        return TOWERS * super().get_num_image_tokens(image_width=image_width, image_height=image_height)


class DinoTower(Dinov2Model):
    """Modification to DINOv2 of transformers: returns only patches, before the final norm. Not tensor parallel."""

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__(config)
        del self.layernorm

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, patches, C)."""
        states: Tensor = self.encoder(self.embeddings(pixel_values)).last_hidden_state
        return states[:, 1:]


class InterleavingProjector(nn.Module):
    """LLaVA's projector for each tower."""

    def __init__(self, clip: nn.Module, dino: nn.Module) -> None:
        super().__init__()
        self.clip, self.dino = clip, dino

    def forward(self, features: Tensor) -> Tensor:
        """(B, towers, n, C) -> (B, n * towers, hidden)."""
        clip, dino = features.unbind(1)
        return torch.stack([self.clip(clip), self.dino(dino)], dim=2).flatten(1, 2)


@MULTIMODAL_REGISTRY.register_processor(
    FoldLlavaMultiModalProcessor, info=MmvpProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class FoldMmvpForConditionalGeneration(FoldLlavaForConditionalGeneration):
    """Modifications to foldserve's LLaVA:

    - a second tower sees the same pixels, normalized for CLIP, as in the authors' code;
    - each tower has a projector, and their tokens alternate.
    """

    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | WeightsMapper(
        orig_to_new_substr={  # names in published checkpoints of DINOv2 -> those of transformers 5
            ".attention.attention.query.": ".attention.q_proj.",
            ".attention.attention.key.": ".attention.k_proj.",
            ".attention.attention.value.": ".attention.v_proj.",
            ".attention.output.dense.": ".attention.o_proj.",
        },
        orig_to_new_prefix={"dino_tower.embeddings.mask_token": None, "dino_tower.layernorm.": None},  # not used
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config

        def projector(name: str) -> LlavaMultiModalProjector:
            return LlavaMultiModalProjector(
                vision_hidden_size=config.vision_config.hidden_size,
                text_hidden_size=config.text_config.hidden_size,
                projector_hidden_act=config.projector_hidden_act,
                multimodal_projector_bias=config.multimodal_projector_bias,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, f"multi_modal_projector.{name}"),
            )

        with self._mark_tower_model(vllm_config, "image"):
            self.dino_tower = DinoTower(dino_config(config))
            self.multi_modal_projector = InterleavingProjector(projector("clip"), projector("dino"))

    def _image_pixels_to_features(self, vision_tower: nn.Module, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, towers, patches, C)."""
        clip = super()._image_pixels_to_features(vision_tower, pixel_values)
        return torch.stack([clip, self.dino_tower(pixel_values)], dim=1)

    def get_mm_mapping(self) -> MultiModelKeys:
        return MultiModelKeys.from_string_field(
            language_model="language_model",
            connector="multi_modal_projector",
            tower_model=["vision_tower", "dino_tower"],
        )


def dino_config(hf_config: PretrainedConfig) -> Dinov2Config:
    """The object `dino_config` of config.json, checked.

    Raises:
        ValueError: it is missing, or the towers' grids or widths differ.
    """
    vision, fields = hf_config.vision_config, getattr(hf_config, "dino_config", None)
    if not isinstance(vision, CLIPVisionConfig):
        raise ValueError(f"{ARCHITECTURE} needs CLIP as its vision_config, not {vision.model_type!r}")
    if hf_config.vision_feature_select_strategy != "default" or not isinstance(hf_config.vision_feature_layer, int):
        raise ValueError(
            f"{ARCHITECTURE} takes the patches of one layer of CLIP: vision_feature_select_strategy must be 'default', "
            f"not {hf_config.vision_feature_select_strategy!r}, and vision_feature_layer a number, not "
            f"{hf_config.vision_feature_layer!r}"
        )
    if not isinstance(fields, Mapping) or fields.get("model_type", "dinov2") != "dinov2":
        raise ValueError(f"config.json needs an object `dino_config` with the config of a DINOv2, not {fields!r}")
    dino = Dinov2Config(**{**fields, "use_mask_token": False})
    if vision.image_size % dino.patch_size or vision.image_size // dino.patch_size != _side(vision):
        raise ValueError(
            f"CLIP and DINOv2 must have one grid of patches, but an image of {vision.image_size} pixels is cut into "
            f"patches of {vision.patch_size} and of {dino.patch_size} pixels"
        )
    if dino.hidden_size != vision.hidden_size:
        raise ValueError(
            f"CLIP and DINOv2 must be of one width, as in the authors' code, not {vision.hidden_size} and "
            f"{dino.hidden_size}"
        )
    return dino


def mmvp_geometry(hf_config: PretrainedConfig) -> VisionGeometry:
    """Geometry of each of the two grids; raises ValueError as `dino_config`."""
    dino_config(hf_config)
    return _geometry(_side(hf_config.vision_config))


@lru_cache(maxsize=64)  # one object per model, as the key of the plans' caches
def _geometry(side: int) -> VisionGeometry:
    stages = frozenset({Stage.AFTER_TOWER, Stage.DECODER})
    return VisionGeometry(side**2, (side, side), stages=stages, shows_tower=True)


def _side(vision: CLIPVisionConfig) -> int:
    return int(vision.image_size // vision.patch_size)
