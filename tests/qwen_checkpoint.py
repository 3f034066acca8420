"""Small Qwen-VL checkpoints with random weights, published names and structure, and a tokenizer of bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import (
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from tests.random_weights import draw_weights

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
"""What stands for an image or a video in a prompt."""

_MARKS = ("im_start", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type in ('image', 'image_url') or 'image' in c %}"
    + IMAGE
    + "{% elif c.type in ('video', 'video_url') or 'video' in c %}"
    + VIDEO
    + "{% elif 'text' in c %}"
    "{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SIZE_2 = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 256}
_SIZE_3 = {"shortest_edge": 64 * 64, "longest_edge": 32 * 32 * 256}
"""Pixels that an image has at least and at most."""

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_QWEN2_5_VISION = {
    "depth": 4,
    "hidden_size": 64,
    "out_hidden_size": 128,
    "intermediate_size": 96,
    "num_heads": 4,
    "patch_size": 14,
    "window_size": 56,
    "fullatt_block_indexes": [1, 3],
    "tokens_per_second": 2,
}
_QWEN3_VISION = {
    "depth": 4,
    "hidden_size": 64,
    "out_hidden_size": 128,
    "intermediate_size": 96,
    "num_heads": 4,
    "patch_size": 16,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1, 2],
}
_QWEN3_5_VISION = {name: value for name, value in _QWEN3_VISION.items() if name != "deepstack_visual_indexes"}


def write(path: Path, model_type: str) -> Path:
    """Makes one of `MODELS`: 8 decoder layers, a tower of 3 or 4; an image has at most 256 tokens."""
    torch.manual_seed(0)
    model, processor = MODELS[model_type](_tokenizer())
    draw_weights(model)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    if model_type == "qwen3_vl_moe":
        _transpose_experts(path / "model.safetensors")
    if model_type == "qwen3_5_moe":
        _stack_experts(path / "model.safetensors")
    return path


def write_bench(path: Path, model_type: str) -> Path:
    """Makes a "qwen2_5_vl" or "qwen3_vl" for benchmarks, in bf16."""
    model, processor = {"qwen2_5_vl": _qwen2_5_bench, "qwen3_vl": _qwen3_bench}[model_type](_tokenizer())
    draw_weights(model)
    model.bfloat16().save_pretrained(path)
    processor.save_pretrained(path)
    return path


def describe(
    path: Path, model_type: str, text: Mapping[str, Any], vision: Mapping[str, Any], pixels: tuple[int, int]
) -> None:
    """Writes all but the weights of a model of these sizes, whose images have so many pixels (least, most)."""
    tokenizer = _tokenizer()
    architecture = _ARCHITECTURES[model_type]
    whole = {"text_config": _text(tokenizer, **text), "vision_config": dict(vision), **_ids(tokenizer)}
    config = architecture.config_class(**whole, tie_word_embeddings=text["tie_word_embeddings"])
    config.architectures = [architecture.__name__]
    config.save_pretrained(path)
    size = {"shortest_edge": pixels[0], "longest_edge": pixels[1]}
    _PROCESSORS[model_type](tokenizer, size).save_pretrained(path)


def _transpose_experts(file: Path) -> None:
    """As published; transformers saves them as it holds them, and reads both."""
    weights = load_file(file)
    for name in [name for name in weights if ".experts." in name]:
        weights[name] = weights[name].mT.contiguous()
    save_file(weights, file, metadata={"format": "pt"})


def _stack_experts(file: Path) -> None:
    """As published, all experts of a layer in one tensor; transformers saves them one by one, and reads both."""
    weights = load_file(file)
    for down in [name for name in weights if name.endswith(".experts.0.down_proj.weight")]:
        experts = down.removesuffix("0.down_proj.weight")
        stacked: dict[str, list[Tensor]] = {"gate_up_proj": [], "down_proj": []}
        for i in count():
            if f"{experts}{i}.down_proj.weight" not in weights:
                break
            gate, up, back = (weights.pop(f"{experts}{i}.{name}_proj.weight") for name in ("gate", "up", "down"))
            stacked["gate_up_proj"].append(torch.cat([gate, up]))
            stacked["down_proj"].append(back)
        weights |= {f"{experts}{name}": torch.stack(each) for name, each in stacked.items()}
    save_file(weights, file, metadata={"format": "pt"})


def _qwen2(tokenizer: Qwen2Tokenizer) -> tuple[PreTrainedModel, ProcessorMixin]:
    vision = {"depth": 3, "embed_dim": 64, "hidden_size": 128, "num_heads": 4, "mlp_ratio": 2, "patch_size": 14}
    rope = _ROPE | {"mrope_section": [4, 6, 6]}
    text = _text(tokenizer, rope_parameters=rope)
    config = Qwen2VLConfig(text_config=text, vision_config=vision, **_ids(tokenizer))
    return Qwen2VLForConditionalGeneration(config), _qwen2_processor(tokenizer, _SIZE_2)


def _qwen2_5(tokenizer: Qwen2Tokenizer) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Windows of 2 x 2 tokens in the tower's layers 0 and 2."""
    text = _text(tokenizer, rope_parameters=_ROPE | {"mrope_section": [4, 6, 6]})
    config = Qwen2_5_VLConfig(text_config=text, vision_config=_QWEN2_5_VISION, **_ids(tokenizer))
    return Qwen2_5_VLForConditionalGeneration(config), _qwen2_5_processor(tokenizer, _SIZE_2)


def _qwen3(tokenizer: Qwen2Tokenizer) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Deepstack levels of the tower's layers 0, 1 and 2."""
    config = Qwen3VLConfig(text_config=_qwen3_text(tokenizer), vision_config=_QWEN3_VISION, **_ids(tokenizer))
    return Qwen3VLForConditionalGeneration(config), _qwen3_processor(tokenizer, _SIZE_3)


def _qwen3_moe(tokenizer: Qwen2Tokenizer) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The same with four experts, of which two are taken."""
    experts: dict[str, Any] = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "norm_topk_prob": True,
    }
    config = Qwen3VLMoeConfig(
        text_config=_qwen3_text(tokenizer, **experts), vision_config=_QWEN3_VISION, **_ids(tokenizer)
    )
    return Qwen3VLMoeForConditionalGeneration(config), _qwen3_processor(tokenizer, _SIZE_3)


def _qwen3_5(tokenizer: Qwen2Tokenizer) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Three layers with a recurrent state, then one with attention; no deepstack levels."""
    config = Qwen3_5Config(text_config=_qwen3_5_text(tokenizer), vision_config=_QWEN3_5_VISION, **_ids(tokenizer))
    return Qwen3_5ForConditionalGeneration(config), _qwen3_processor(tokenizer, _SIZE_3)


def _qwen3_5_moe(tokenizer: Qwen2Tokenizer) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The same with four experts, of which two are taken, and one that all tokens share."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
    text = _qwen3_5_text(tokenizer, **experts, shared_expert_intermediate_size=96)
    config = Qwen3_5MoeConfig(text_config=text, vision_config=_QWEN3_5_VISION, **_ids(tokenizer))
    return Qwen3_5MoeForConditionalGeneration(config), _qwen3_processor(tokenizer, _SIZE_3)


def _qwen3_5_text(tokenizer: Qwen2Tokenizer, **more: object) -> dict[str, Any]:
    """A state takes as much as the keys and values of 18 tokens, so that blocks of the KV cache are of 32."""
    rope = _ROPE | {"mrope_section": [4, 2, 2], "mrope_interleaved": True, "partial_rotary_factor": 0.25}
    linear = {"linear_num_key_heads": 1, "linear_num_value_heads": 2}
    linear |= {"linear_key_head_dim": 64, "linear_value_head_dim": 64}  # vLLM's kernel for CPUs takes 64 or 128
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    return _text(tokenizer, rope_parameters=rope, **heads, **linear, **more)


def _qwen3_text(
    tokenizer: Qwen2Tokenizer, *, head_dim: int = 32, mrope_section: Sequence[int] = (6, 5, 5), **more: object
) -> dict[str, Any]:
    rope = _ROPE | {"mrope_section": list(mrope_section), "mrope_interleaved": True}
    return _text(tokenizer, rope_parameters=rope, head_dim=head_dim, **more)


def _qwen2_processor(tokenizer: Qwen2Tokenizer, size: dict[str, int]) -> ProcessorMixin:
    return Qwen2VLProcessor(*_parts(tokenizer, size), chat_template=_TEMPLATE)


def _qwen2_5_processor(tokenizer: Qwen2Tokenizer, size: dict[str, int]) -> ProcessorMixin:
    return Qwen2_5_VLProcessor(*_parts(tokenizer, size), chat_template=_TEMPLATE)


def _qwen3_processor(tokenizer: Qwen2Tokenizer, size: dict[str, int]) -> ProcessorMixin:
    images = Qwen2VLImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3, size=size, patch_size=16)
    videos = Qwen3VLVideoProcessor(size=size, patch_size=16)
    return Qwen3VLProcessor(images, tokenizer, videos, chat_template=_TEMPLATE)


def _qwen2_5_bench(tokenizer: Qwen2Tokenizer) -> tuple[PreTrainedModel, ProcessorMixin]:
    """16 decoder layers of width 1024, a tower of 8 layers of width 320."""
    decoder = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16}
    text = _text(tokenizer, rope_parameters=_ROPE | {"mrope_section": [8, 12, 12]}, **decoder, **heads)
    tower = {"depth": 8, "hidden_size": 320, "intermediate_size": 1280, "num_heads": 4, "out_hidden_size": 1024}
    windows = {"window_size": 112, "fullatt_block_indexes": [3, 7]}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=_QWEN2_5_VISION | tower | windows, **_ids(tokenizer))
    processor = _qwen2_5_processor(tokenizer, _SIZE_2 | {"longest_edge": 28 * 28 * 1024})
    return Qwen2_5_VLForConditionalGeneration(config), processor


def _qwen3_bench(tokenizer: Qwen2Tokenizer) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Qwen3-VL-2B with 6 of its 24 tower layers. The tower takes 0.22 of the FLOPs at 256 tokens, the 8B's 0.21."""
    decoder: dict[str, Any] = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28}
    heads: dict[str, Any] = {"num_attention_heads": 16, "num_key_value_heads": 8}
    text = _qwen3_text(tokenizer, **decoder, **heads, head_dim=128, mrope_section=[24, 20, 20])
    tower = {"depth": 6, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2048}
    vision = _QWEN3_VISION | tower | {"deepstack_visual_indexes": [1, 2, 3]}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **_ids(tokenizer))
    processor = _qwen3_processor(tokenizer, _SIZE_3 | {"longest_edge": 32 * 32 * 1024})
    return Qwen3VLForConditionalGeneration(config), processor


MODELS: Mapping[str, Callable[[Qwen2Tokenizer], tuple[PreTrainedModel, ProcessorMixin]]] = {
    "qwen2_vl": _qwen2,
    "qwen2_5_vl": _qwen2_5,
    "qwen3_vl": _qwen3,
    "qwen3_vl_moe": _qwen3_moe,
    "qwen3_5": _qwen3_5,
    "qwen3_5_moe": _qwen3_5_moe,
}
_ARCHITECTURES: Mapping[str, type[PreTrainedModel]] = {
    "qwen2_vl": Qwen2VLForConditionalGeneration,
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
    "qwen3_vl_moe": Qwen3VLMoeForConditionalGeneration,
}
_PROCESSORS: Mapping[str, Callable[[Qwen2Tokenizer, dict[str, int]], ProcessorMixin]] = {
    "qwen2_vl": _qwen2_processor,
    "qwen2_5_vl": _qwen2_5_processor,
    "qwen3_vl": _qwen3_processor,
    "qwen3_vl_moe": _qwen3_processor,
}


def _tokenizer() -> Qwen2Tokenizer:
    vocabulary = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    marks = [f"<|{name}|>" for name in _MARKS]
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], additional_special_tokens=marks)
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def _ids(tokenizer: Qwen2Tokenizer) -> dict[str, int]:
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    names |= {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
    return {field: tokenizer.convert_tokens_to_ids(f"<|{mark}|>") for field, mark in names.items()}


def _text(tokenizer: Qwen2Tokenizer, **more: object) -> dict[str, Any]:
    sizes = {"vocab_size": 288, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192}
    ids = {"eos_token_id": "<|im_end|>", "pad_token_id": "<|endoftext|>"}
    found = {field: tokenizer.convert_tokens_to_ids(token) for field, token in ids.items()}
    return {**sizes, **heads, "bos_token_id": None, **found, **more}


def _parts(
    tokenizer: Qwen2Tokenizer, size: dict[str, int]
) -> tuple[Qwen2VLImageProcessor, Qwen2Tokenizer, Qwen2VLVideoProcessor]:
    return Qwen2VLImageProcessor(size=size), tokenizer, Qwen2VLVideoProcessor(size=size)
