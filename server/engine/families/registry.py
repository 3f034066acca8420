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
class Entry:
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


ENTRIES: Mapping[str, Entry] = MappingProxyType(
    {
        "Gemma3ForConditionalGeneration": Entry("gemma3.Gemma3Family", "gemma3.FoldGemma3ForConditionalGeneration"),
        "Idefics3ForConditionalGeneration": Entry(
            "idefics3.Idefics3Family", "idefics3.FoldIdefics3ForConditionalGeneration"
        ),
        "InternVLChatModel": Entry("internvl.InternVLFamily", "internvl.FoldInternVLChatModel"),
        "InternVLForConditionalGeneration": Entry(
            "internvl_hf.InternVLHFFamily", "internvl_hf.FoldInternVLForConditionalGeneration"
        ),
        "LlavaForConditionalGeneration": Entry("llava.LlavaFamily", "llava.FoldLlavaForConditionalGeneration"),
        "LlavaNextForConditionalGeneration": Entry(
            "llava_next.LlavaNextFamily", "llava_next.FoldLlavaNextForConditionalGeneration"
        ),
        "LlavaOnevisionForConditionalGeneration": Entry(
            "llava_onevision.LlavaOnevisionFamily", "llava_onevision.FoldLlavaOnevisionForConditionalGeneration"
        ),
        "LlavaStfForConditionalGeneration": Entry(
            "llava_stf.StfFamily", "llava_stf.FoldLlavaStfForConditionalGeneration"
        ),
        "MmvpForConditionalGeneration": Entry("mmvp.MmvpFamily", "mmvp.FoldMmvpForConditionalGeneration"),
        "LlavaNextVideoForConditionalGeneration": Entry(
            "llava_next_video.LlavaNextVideoFamily", "llava_next_video.FoldLlavaNextVideoForConditionalGeneration"
        ),
        "VideoLlavaForConditionalGeneration": Entry(
            "video_llava.VideoLlavaFamily", "video_llava.FoldVideoLlavaForConditionalGeneration"
        ),
        "Qwen2VLForConditionalGeneration": Entry(
            "qwen_vl.QwenVLFamily", "qwen2_vl.FoldQwen2VLForConditionalGeneration"
        ),
        "Qwen2_5_VLForConditionalGeneration": Entry(
            "qwen_vl.QwenVLFamily", "qwen2_5_vl.FoldQwen2_5_VLForConditionalGeneration"
        ),
        "Qwen3VLForConditionalGeneration": Entry(
            "qwen_vl.QwenVLFamily", "qwen3_vl.FoldQwen3VLForConditionalGeneration"
        ),
        "Qwen3VLMoeForConditionalGeneration": Entry(
            "qwen_vl.QwenVLFamily", "qwen3_vl_moe.FoldQwen3VLMoeForConditionalGeneration"
        ),
        "Qwen3_5ForConditionalGeneration": Entry("qwen_vl.QwenVLFamily", "qwen3_5.FoldQwen3_5ForConditionalGeneration"),
        "Qwen3_5MoeForConditionalGeneration": Entry(
            "qwen_vl.QwenVLFamily", "qwen3_5.FoldQwen3_5MoeForConditionalGeneration"
        ),
        "SmolVLMForConditionalGeneration": Entry(
            "idefics3.Idefics3Family", "smolvlm.FoldSmolVLMForConditionalGeneration"
        ),
    }
)
"""By architecture, as config.json names it."""


def family_of(model_config: ModelConfig) -> Family | None:
    """The family of a checkpoint; None if foldserve does not reduce it; ValueError if its config is wrong."""
    for architecture in model_config.hf_config.architectures or ():
        if (entry := ENTRIES.get(architecture)) is not None:
            return entry.load_family().of(model_config)
    return None
