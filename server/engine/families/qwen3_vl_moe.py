"""Qwen3-VL with a mixture of experts."""

from __future__ import annotations

from vllm.model_executor.models.qwen3_vl import Qwen3VLDummyInputsBuilder
from vllm.model_executor.models.qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeProcessingInfo
from vllm.multimodal import MULTIMODAL_REGISTRY

from foldserve.server.engine.families.qwen3_vl import FoldQwen3VLMultiModalProcessor
from foldserve.server.engine.mrope import MropeModel


@MULTIMODAL_REGISTRY.register_processor(
    FoldQwen3VLMultiModalProcessor, info=Qwen3VLMoeProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class FoldQwen3VLMoeForConditionalGeneration(MropeModel, Qwen3VLMoeForConditionalGeneration):
    """See `MropeModel`."""
