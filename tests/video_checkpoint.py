"""Small Video-LLaVA and LLaVA-NeXT-Video checkpoints with random weights, published names and a tokenizer of bytes."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextImageProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
    LlavaNextVideoVideoProcessor,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2Tokenizer,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VideoLlavaImageProcessor,
    VideoLlavaProcessor,
    VideoLlavaVideoProcessor,
)

from tests.random_weights import draw_weights, publish_tower_names

SIDE = 72
"""Of an image or a frame, in pixels: 12 x 12 patches, which LLaVA-NeXT-Video pools to 6 x 6."""

PATCH = 6  # vLLM's LLaVA-NeXT-Video divides by image size // patch size ** 2
FRAMES = 4
"""Of a video, that Video-LLaVA was trained with."""

_TEMPLATE = (
    "{% for m in messages %}{{ m.role | upper }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% elif 'video' in c.type %}<video>\n{% else %}"
    "<image>\n{% endif %}{% endfor %}{% endif %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def write_video_llava(path: Path) -> Path:
    """Makes one as `LanguageBind/Video-LLaVA-7B-hf`: towers of 4 layers, 4 decoder layers."""
    torch.manual_seed(0)  # of class tokens
    tokenizer = _tokenizer()
    config = VideoLlavaConfig(
        vision_config=_vision(),
        text_config=_text(tokenizer),
        image_seq_length=144,
        video_seq_length=FRAMES * 145,
        architectures=["VideoLlavaForConditionalGeneration"],
        **_ids(tokenizer),
    )
    size, crop = {"shortest_edge": SIDE}, {"height": SIDE, "width": SIDE}
    processor = VideoLlavaProcessor(
        VideoLlavaImageProcessor(size=size, crop_size=crop),
        VideoLlavaVideoProcessor(size=size, crop_size=crop),
        tokenizer,
        patch_size=PATCH,
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    )
    return _save(VideoLlavaForConditionalGeneration(config), processor, path)


def write_llava_next_video(path: Path) -> Path:
    """Makes one as `llava-hf/LLaVA-NeXT-Video-7B-hf`: a tower of 4 layers, 4 decoder layers."""
    torch.manual_seed(0)  # of class tokens
    tokenizer = _tokenizer()
    config = LlavaNextVideoConfig(
        vision_config=_vision(),
        text_config=_text(tokenizer),
        spatial_pool_mode="average",
        spatial_pool_stride=2,
        architectures=["LlavaNextVideoForConditionalGeneration"],
        **_ids(tokenizer),
    )
    size, crop = {"shortest_edge": SIDE}, {"height": SIDE, "width": SIDE}
    processor = LlavaNextVideoProcessor(
        LlavaNextVideoVideoProcessor(size=size, crop_size=crop),
        LlavaNextImageProcessor(size=size, crop_size=crop),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    )
    return _save(LlavaNextVideoForConditionalGeneration(config), processor, path)


def _save(model: PreTrainedModel, processor: ProcessorMixin, path: Path) -> Path:
    draw_weights(model)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    publish_tower_names(path)
    return path


def _tokenizer() -> Qwen2Tokenizer:
    vocabulary = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], additional_special_tokens=["<image>", "<video>"])


def _ids(tokenizer: Qwen2Tokenizer) -> dict[str, int]:
    return {f"{name}_token_index": tokenizer.convert_tokens_to_ids(f"<{name}>") for name in ("image", "video")}


def _vision() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=32,
    )


def _text(tokenizer: Qwen2Tokenizer) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=288,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
