"""SmolVLM2, which is Idefics3 with another processor."""

from __future__ import annotations

from vllm.model_executor.models.idefics3 import Idefics3DummyInputsBuilder
from vllm.model_executor.models.smolvlm import SmolVLMForConditionalGeneration, SmolVLMProcessingInfo
from vllm.multimodal import MULTIMODAL_REGISTRY

from foldserve.server.engine.families.idefics3 import FoldIdefics3MultiModalProcessor, Idefics3Model


@MULTIMODAL_REGISTRY.register_processor(
    FoldIdefics3MultiModalProcessor, info=SmolVLMProcessingInfo, dummy_inputs=Idefics3DummyInputsBuilder
)
class FoldSmolVLMForConditionalGeneration(Idefics3Model, SmolVLMForConditionalGeneration):
    """See `Idefics3Model`."""
