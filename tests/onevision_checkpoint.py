"""A small LLaVA-OneVision checkpoint with random weights, published names and structure, and a tokenizer of bytes."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2Config,
    Qwen2Tokenizer,
    SiglipVisionConfig,
)

from tests.random_weights import publish_tower_names

SIDE = 126
"""Of a tile, in pixels: 9 x 9 tokens, which pool to 5 x 5, as the published 27 x 27 do to 14 x 14."""

_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% elif 'video' in c.type %}<video>\n{% else %}"
    "<image>\n{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def config(side: int = SIDE, layers: int = 4, image: int = 0, video: int = 0, **text: object) -> LlavaOnevisionConfig:
    """As published, `llava-hf/llava-onevision-qwen2-7b-ov-hf`, but for sizes."""
    canvases = [[down * side, across * side] for down in range(1, 7) for across in range(1, 7)]
    vision = {"num_hidden_layers": layers, "image_size": side, "patch_size": 14, "vision_use_head": False}
    small = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**small, **vision),
        text_config=Qwen2Config(**text),
        image_token_index=image,
        video_token_index=video,
        image_grid_pinpoints=canvases,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        architectures=["LlavaOnevisionForConditionalGeneration"],
        tie_word_embeddings=False,
    )


def write(path: Path, layers: int = 4) -> Path:
    """Makes one: a tower of so many layers, 4 decoder layers; canvases of up to 6 x 6 tiles."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    marks = ["<|im_start|>", "<|im_end|>", "<image>", "<video>"]
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], additional_special_tokens=marks)
    tokenizer.chat_template = _TEMPLATE
    ids = dict(zip(marks, tokenizer.convert_tokens_to_ids(marks), strict=True))
    text = {"vocab_size": 288, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 4}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192}
    ends = {"eos_token_id": ids["<|im_end|>"], "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    whole = config(layers=layers, image=ids["<image>"], video=ids["<video>"], **text, **ends)
    model = LlavaOnevisionForConditionalGeneration(whole)
    _draw_weights(model)
    model.save_pretrained(path)
    publish_tower_names(path)
    size = {"height": SIDE, "width": SIDE}
    images = LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=model.config.image_grid_pinpoints)
    videos = LlavaOnevisionVideoProcessor(size=size)
    LlavaOnevisionProcessor(
        images,
        tokenizer,
        videos,
        num_image_tokens=(SIDE // 14) ** 2,
        vision_feature_select_strategy="full",
        chat_template=_TEMPLATE,
    ).save_pretrained(path)
    return path


def _draw_weights(model: LlavaOnevisionForConditionalGeneration) -> None:
    """Larger than an initializer's, so that answers depend on images and on where tokens stand."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            is_table = "embed" in name and "patch" not in name
            if weight.ndim >= 2:
                scale = 1.0 if is_table else 1.5 / weight[0].numel() ** 0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
            elif name.endswith(("bias", "newline")):
                weight.copy_(torch.randn(weight.shape, generator=generator) * (0.1 if "bias" in name else 1.0))
