"""Maps architectures to families. Modules are named as strings, so a process imports only what it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING

from vllm.config import ModelConfig

if TYPE_CHECKING:
    from foldserve.server.engine.family import Family


@dataclass(frozen=True, slots=True)
class FamilyClasses:
    """The classes of a family as "file.Class" in this package: the `Family`, and the model that replaces vLLM's own."""

    family: str
    model: str

    @property
    def model_path(self) -> str:
        """In the format of vLLM's registry."""
        return f"{__package__}.{self.model.replace('.', ':')}"

    def load_family(self) -> type[Family]:
        file, _, name = self.family.partition(".")
        family: type[Family] = getattr(import_module(f"{__package__}.{file}"), name)
        return family


FAMILY_CLASSES: Mapping[str, FamilyClasses] = MappingProxyType(
    {
        "Gemma3ForConditionalGeneration": FamilyClasses(
            "gemma3.Gemma3Family", "gemma3.FoldGemma3ForConditionalGeneration"
        ),
        "Idefics3ForConditionalGeneration": FamilyClasses(
            "idefics3.Idefics3Family", "idefics3.FoldIdefics3ForConditionalGeneration"
        ),
        "InternVLChatModel": FamilyClasses("internvl.InternVLFamily", "internvl.FoldInternVLChatModel"),
        "InternVLForConditionalGeneration": FamilyClasses(
            "internvl_hf.InternVLHFFamily", "internvl_hf.FoldInternVLForConditionalGeneration"
        ),
        "LlavaForConditionalGeneration": FamilyClasses("llava.LlavaFamily", "llava.FoldLlavaForConditionalGeneration"),
        "LlavaNextForConditionalGeneration": FamilyClasses(
            "llava_next.LlavaNextFamily", "llava_next.FoldLlavaNextForConditionalGeneration"
        ),
        "LlavaOnevisionForConditionalGeneration": FamilyClasses(
            "llava_onevision.LlavaOnevisionFamily", "llava_onevision.FoldLlavaOnevisionForConditionalGeneration"
        ),
        "LlavaStfForConditionalGeneration": FamilyClasses(
            "llava_stf.StfFamily", "llava_stf.FoldLlavaStfForConditionalGeneration"
        ),
        "MmvpForConditionalGeneration": FamilyClasses("mmvp.MmvpFamily", "mmvp.FoldMmvpForConditionalGeneration"),
        "LlavaNextVideoForConditionalGeneration": FamilyClasses(
            "llava_next_video.LlavaNextVideoFamily", "llava_next_video.FoldLlavaNextVideoForConditionalGeneration"
        ),
        "VideoLlavaForConditionalGeneration": FamilyClasses(
            "video_llava.VideoLlavaFamily", "video_llava.FoldVideoLlavaForConditionalGeneration"
        ),
        "Qwen2VLForConditionalGeneration": FamilyClasses(
            "qwen_vl.QwenVLFamily", "qwen2_vl.FoldQwen2VLForConditionalGeneration"
        ),
        "Qwen2_5_VLForConditionalGeneration": FamilyClasses(
            "qwen_vl.QwenVLFamily", "qwen2_5_vl.FoldQwen2_5_VLForConditionalGeneration"
        ),
        "Qwen3VLForConditionalGeneration": FamilyClasses(
            "qwen_vl.QwenVLFamily", "qwen3_vl.FoldQwen3VLForConditionalGeneration"
        ),
        "Qwen3VLMoeForConditionalGeneration": FamilyClasses(
            "qwen_vl.QwenVLFamily", "qwen3_vl_moe.FoldQwen3VLMoeForConditionalGeneration"
        ),
        "Qwen3_5ForConditionalGeneration": FamilyClasses(
            "qwen_vl.QwenVLFamily", "qwen3_5.FoldQwen3_5ForConditionalGeneration"
        ),
        "Qwen3_5MoeForConditionalGeneration": FamilyClasses(
            "qwen_vl.QwenVLFamily", "qwen3_5.FoldQwen3_5MoeForConditionalGeneration"
        ),
        "SmolVLMForConditionalGeneration": FamilyClasses(
            "idefics3.Idefics3Family", "smolvlm.FoldSmolVLMForConditionalGeneration"
        ),
    }
)
"""By architecture, as config.json names it."""


def family_of(model_config: ModelConfig) -> Family | None:
    """The family of a checkpoint; None if foldserve does not reduce it; ValueError if its config is wrong."""
    for architecture in model_config.hf_config.architectures or ():
        if (entry := FAMILY_CLASSES.get(architecture)) is not None:
            return entry.load_family().of(model_config)
    return None
