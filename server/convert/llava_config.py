"""Converts LLaVA's own flat config.json to the nested one of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig

from foldserve.server.convert.source import ConversionError, read_json

_NEEDED = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "rms_norm_eps",
    "vocab_size",
)
_OPTIONAL = (
    "attention_bias",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "mlp_bias",
    "num_key_value_heads",
    "pad_token_id",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
)

# Fields that vary between kinds of LLaVA. Only these values, or no such field, can be converted.
_ONLY = {
    "mm_patch_merge_type": ("flat",),
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_use_im_patch_token": (False,),
    "mm_use_im_start_end": (False,),
    "mm_vision_select_feature": ("patch",),
    "image_aspect_ratio": ("pad", "square", None),
}

_CLIP_L_336 = "openai/clip-vit-large-patch14-336"


def text_config(source: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder's fields of LLaVA's config.

    Raises ConversionError for another layout, a missing field, or an unsupported kind of LLaVA.
    """
    if "text_config" in source:
        raise ConversionError("config.json has a text_config: this checkpoint is in the layout of transformers already")
    for name, supported in _ONLY.items():
        if source.get(name, supported[0]) not in supported:
            allowed = " or ".join(map(repr, supported))
            raise ConversionError(f"config.json has {name} = {source[name]!r}; only {allowed} can be converted")
    if missing := [name for name in _NEEDED if source.get(name) is None]:
        raise ConversionError(f"config.json lacks {', '.join(missing)}: is it of a LLaVA with a Llama decoder?")
    return {name: source[name] for name in (*_NEEDED, *_OPTIONAL) if source.get(name) is not None}


def pads_to_square(source: Mapping[str, Any]) -> bool:
    """Whether images are padded to a square, as LLaVA-1.5 was trained, or cropped to one."""
    return source.get("image_aspect_ratio") == "pad"


def llama_config(text: Mapping[str, Any]) -> LlamaConfig:
    return LlamaConfig(**text)


def vision_config(source: Mapping[str, Any], folder: Path | None) -> CLIPVisionConfig:
    """The tower's config, from its own folder or, for the tower of LLaVA-1.5, by its name.

    Raises ConversionError for another tower than CLIP, or for one that needs its folder.
    """
    if folder is None:
        if source.get("mm_vision_tower") != _CLIP_L_336:
            raise ConversionError(
                f"config.json has mm_vision_tower = {source.get('mm_vision_tower')!r}, of which only "
                f"{_CLIP_L_336!r} is known: give --vision-tower DIR with the tower's own config.json"
            )
        return CLIPVisionConfig(
            hidden_size=1024,
            image_size=336,
            intermediate_size=4096,
            num_attention_heads=16,
            num_hidden_layers=24,
            patch_size=14,
            projection_dim=768,
        )
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise ConversionError(f"--vision-tower {folder} has model_type {kind!r}: a CLIP tower is needed")
    return CLIPVisionConfig.from_pretrained(folder, local_files_only=True)
