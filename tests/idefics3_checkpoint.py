"""Small Idefics3 and SmolVLM checkpoints with random weights, published names and structure, a tokenizer of bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    GPT2Tokenizer,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from tests.random_weights import draw_weights

SIDE, LONGEST = 168, 504
"""Of a tile, in pixels: 12 x 12 patches, 6 x 6 tokens. And of an image before it is cut, its longer side."""

_MARKS = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>"}
_MARKS |= {"end_of_utterance_token": "<end_of_utterance>", "global_image_token": "<global-img>"}
_ROWS = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'text' %}{{ c.text }}{% else %}<image>{% endif %}{% endfor %}{% endif %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def write(path: Path, model_type: str) -> Path:
    """Makes an "idefics3", as SmolVLM-256M and -500M are, or a "smolvlm", as SmolVLM2 is; weights are the same."""
    tokenizer = _tokenizer()
    end: int = tokenizer.convert_tokens_to_ids("<|im_end|>")
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes = {"vocab_size": 288, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192}
    ids = {"pad_token_id": end, "bos_token_id": None, "eos_token_id": end}
    parts: dict[str, Any] = {
        "vision_config": {**vision, "image_size": SIDE, "patch_size": 14},
        "text_config": {"model_type": "llama", "architectures": ["VLlama3ForCausalLM"], **sizes, **heads, **ids},
        "scale_factor": 2,
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "pad_token_id": end,
        "tie_word_embeddings": False,
    }
    images: dict[str, Any] = {"size": {"longest_edge": LONGEST}, "max_image_size": {"longest_edge": SIDE}}
    images |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    torch.manual_seed(0)
    if model_type == "smolvlm":
        model: Any = SmolVLMForConditionalGeneration(SmolVLMConfig(**parts))
        videos = SmolVLMVideoProcessor(size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE})
        processor: Any = SmolVLMProcessor(SmolVLMImageProcessor(**images), tokenizer, videos, image_seq_len=36)
    else:
        model = Idefics3ForConditionalGeneration(Idefics3Config(**parts))
        processor = Idefics3Processor(Idefics3ImageProcessor(**images), tokenizer, image_seq_len=36)
    draw_weights(model)
    model.save_pretrained(path)
    processor.chat_template = _TEMPLATE
    processor.save_pretrained(path)
    return path


def _tokenizer() -> GPT2Tokenizer:
    vocabulary = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    ends = {"unk_token": None, "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    tokenizer = GPT2Tokenizer(vocab=vocabulary, merges=[], extra_special_tokens=_MARKS, **ends)
    tokenizer.add_special_tokens({"additional_special_tokens": _ROWS})
    return tokenizer
