"""Qwen2.5-VL."""

from __future__ import annotations

from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from foldserve.server.engine.families.qwen_vl import QwenImages
from foldserve.server.engine.mrope import MropeModel


class FoldQwen2_5_VLMultiModalProcessor(QwenImages, Qwen2_5_VLMultiModalProcessor):
    """See `QwenImages`."""


@MULTIMODAL_REGISTRY.register_processor(
    FoldQwen2_5_VLMultiModalProcessor, info=Qwen2_5_VLProcessingInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class FoldQwen2_5_VLForConditionalGeneration(MropeModel, Qwen2_5_VLForConditionalGeneration):
    """See `MropeModel`."""
