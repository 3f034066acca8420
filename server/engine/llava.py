"""LLaVA-1.5 with per-image token reduction in or after its vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import MultiModalEmbeddings
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaProcessingInfo,
    _build_llava_or_pixtral_hf_info,
    _build_llava_or_pixtral_hf_processor,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import BaseDummyInputsBuilder, BaseMultiModalProcessor, BaseProcessingInfo
from vllm.transformers_utils.processor import cached_image_processor_from_config

from foldserve.kernels import ops
from foldserve.reducers.plan import Plan
from foldserve.server.engine import positions, withdrawal
from foldserve.server.engine.geometry import vision_geometry
from foldserve.server.engine.pixels import Normalize
from foldserve.server.engine.processor import PLAN_FIELD, FoldLlavaMultiModalProcessor
from foldserve.server.engine.vision import Survivors, encode_images
from foldserve.server.settings import Environment


def _build_processor(
    info: BaseProcessingInfo, dummy_inputs: BaseDummyInputsBuilder[BaseProcessingInfo]
) -> BaseMultiModalProcessor[BaseProcessingInfo]:
    """Ours for CLIP and SigLIP towers, vLLM's own for Pixtral; asked for per request, so that it reads no config."""
    if isinstance(info, LlavaProcessingInfo):
        return FoldLlavaMultiModalProcessor(info, dummy_inputs)
    return _build_llava_or_pixtral_hf_processor(info, dummy_inputs)


@MULTIMODAL_REGISTRY.register_processor(
    _build_processor, info=_build_llava_or_pixtral_hf_info, dummy_inputs=LlavaDummyInputsBuilder
)
class FoldLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """Modifications to vLLM's LLaVA:

    - images may come as bytes;
    - `embed_multimodal` reduces each image by the plan that the processor sent with it, and refuses what the rest of
      the engine would not do: keep positions, or remove tokens in the decoder;
    - with a withdrawal layer configured, the decoder is the withdrawing twin of the checkpoint's own;
    - on a GPU, where the environment asks for it, this process reduces with Triton kernels.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        withdrawal.select_decoder(vllm_config)
        ops.choose(torch.device(vllm_config.device_config.device_type), triton=Environment.read().wants_triton)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._model_config = vllm_config.model_config
        self._geometry = vision_geometry(self.config)
        self._can_keep_positions = positions.limit(vllm_config) is not None
        self._withdraws = withdrawal.withdraw_layer(vllm_config) is not None
        if self._withdraws:
            self.get_model_state_cls = withdrawal.model_state_cls  # asked for by model runner V2 only

    def embed_multimodal(self, **kwargs: object) -> MultiModalEmbeddings:
        """One (plan.kept, hidden) tensor per image; vLLM's own path, bit for bit, when nothing is reduced."""
        rows = kwargs.pop(PLAN_FIELD, None)
        plans: list[Plan] = []
        if isinstance(rows, torch.Tensor) and self._geometry is not None:
            plans = [Plan.from_ints(row, self._geometry) for row in rows.tolist()]  # on the CPU
        if not self._can_keep_positions and any(plan.keeps_positions for plan in plans):
            raise ValueError(positions.CANNOT_KEEP)
        if not self._withdraws and any(plan.decoder != "none" for plan in plans):
            raise ValueError("this engine has no layer K for methods in the decoder: see `withdrawal.configure`")
        if isinstance(pixels := kwargs.get("pixel_values"), torch.Tensor):
            kwargs["pixel_values"] = self.normalized(pixels)
        if all(plan.is_identity for plan in plans):
            return super().embed_multimodal(**kwargs)
        image_input = self._parse_and_validate_image_input(**kwargs)
        assert image_input is not None and image_input["type"] == "pixel_values"
        images = self._embed_reduced(image_input["pixel_values"], plans)
        return [
            positions.attach(image.features, image.source) if plan.keeps_positions else image.features
            for image, plan in zip(images, plans, strict=True)
        ]

    def normalized(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) as the tower wants them, from bytes or as they are."""
        return self._normalize(pixel_values) if pixel_values.dtype == torch.uint8 else pixel_values

    @cached_property
    def _normalize(self) -> Normalize:
        image_processor = cached_image_processor_from_config(self._model_config)
        return Normalize(image_processor, self._model_config.dtype, next(self.vision_tower.parameters()).device)

    def _embed_reduced(self, pixel_values: torch.Tensor, plans: Sequence[Plan]) -> Sequence[Survivors]:
        """Tower, reduction and projector, each image by its plan: embeddings (plan.kept, hidden)."""
        images = encode_images(self.vision_tower, pixel_values, plans, self.config.vision_feature_select_strategy)
        embeds = self.multi_modal_projector(torch.cat([image.features for image in images]))  # (sum of kept, hidden)
        each = zip(images, embeds.split([plan.kept for plan in plans]), strict=True)
        return [image._replace(features=embedded) for image, embedded in each]
