"""A small Gemma-3 checkpoint with random weights, published names and structure, and a tokenizer of letters."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GemmaTokenizer,
)

from tests.random_weights import draw_weights, publish_tower_names

SIDE, WINDOW = 168, 64
"""Of an image, in pixels: 24 x 24 patches, averaged to 6 x 6 tokens. And of the layers that see a window of tokens."""

_MARKS = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% else %}<start_of_image>{% endif %}"
    "{% endfor %}{% endif %}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def write(path: Path) -> Path:
    """Makes one with eight decoder layers, of which the sixth sees all tokens and the others a window."""
    tokenizer = _tokenizer()
    ids = {name: tokenizer.convert_tokens_to_ids(mark) for name, mark in _MARKS.items()}
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    text = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 8, "head_dim": 32}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "query_pre_attn_scalar": 32}
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = Gemma3Config(
        text_config={**text, "sliding_window": WINDOW, "rope_parameters": rope, "max_position_embeddings": 8192},
        vision_config={**vision, "image_size": SIDE, "patch_size": 7, "vision_use_head": False},
        mm_tokens_per_image=36,
        boi_token_index=ids["boi_token"],
        eoi_token_index=ids["eoi_token"],
        image_token_index=ids["image_token"],
    )
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config)
    draw_weights(model)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(0.1)  # they give the logits too, which would leave one token only
    model.save_pretrained(path)
    publish_tower_names(path)
    images = Gemma3ImageProcessor(size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    Gemma3Processor(images, tokenizer, chat_template=_TEMPLATE, image_seq_length=36).save_pretrained(path)
    return path


def _tokenizer() -> GemmaTokenizer:
    """Ends of lines that follow each other are one token, up to four of them; what is no letter is bytes."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted({*string.printable} - {" ", "\n"})
    pieces = [*special, *letters, "▁", *("\n" * n for n in range(1, 5))]
    merges = [("\n", "\n"), ("\n\n", "\n\n"), ("\n\n", "\n")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges, extra_special_tokens=_MARKS)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    return tokenizer
