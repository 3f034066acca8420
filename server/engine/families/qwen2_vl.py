"""Qwen2-VL."""

from __future__ import annotations

from vllm.model_executor.models.qwen2_vl import (
    Qwen2VLDummyInputsBuilder,
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from foldserve.server.engine.families.qwen_vl import QwenImages
from foldserve.server.engine.mrope import MropeModel


class FoldQwen2VLMultiModalProcessor(QwenImages, Qwen2VLMultiModalProcessor):
    """See `QwenImages`."""


@MULTIMODAL_REGISTRY.register_processor(
    FoldQwen2VLMultiModalProcessor, info=Qwen2VLProcessingInfo, dummy_inputs=Qwen2VLDummyInputsBuilder
)
class FoldQwen2VLForConditionalGeneration(MropeModel, Qwen2VLForConditionalGeneration):
    """See `MropeModel`."""
