"""Qwen3.5, dense and with a mixture of experts: Qwen3-VL's images and videos, without deepstack levels.

Most of its decoder layers keep a recurrent state instead of keys and values, so no tokens can be removed there.
"""

from __future__ import annotations

from vllm.model_executor.models.qwen3_5 import (
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeProcessingInfo,
    Qwen3_5ProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl import Qwen3VLDummyInputsBuilder
from vllm.multimodal import MULTIMODAL_REGISTRY

from foldserve.server.engine.families.qwen3_vl import FoldQwen3VLMultiModalProcessor
from foldserve.server.engine.mrope import MropeModel


@MULTIMODAL_REGISTRY.register_processor(
    FoldQwen3VLMultiModalProcessor, info=Qwen3_5ProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class FoldQwen3_5ForConditionalGeneration(MropeModel, Qwen3_5ForConditionalGeneration):
    """See `MropeModel`."""


@MULTIMODAL_REGISTRY.register_processor(
    FoldQwen3VLMultiModalProcessor, info=Qwen3_5MoeProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class FoldQwen3_5MoeForConditionalGeneration(MropeModel, Qwen3_5MoeForConditionalGeneration):
    """See `MropeModel`."""
