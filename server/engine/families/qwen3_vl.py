"""Qwen3-VL."""

from __future__ import annotations

from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from foldserve.server.engine.families.qwen_vl import QwenImages
from foldserve.server.engine.mrope import MropeModel


class FoldQwen3VLMultiModalProcessor(QwenImages, Qwen3VLMultiModalProcessor):
    """See `QwenImages`."""


@MULTIMODAL_REGISTRY.register_processor(
    FoldQwen3VLMultiModalProcessor, info=Qwen3VLProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class FoldQwen3VLForConditionalGeneration(MropeModel, Qwen3VLForConditionalGeneration):
    """See `MropeModel`."""
