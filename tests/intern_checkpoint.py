"""Small InternVL checkpoints with random weights in both published layouts, and a tokenizer of bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    Qwen2Tokenizer,
)

from tests.random_weights import draw_weights

SIDE, MOST_TILES = 168, 6
"""Of a tile, in pixels: 6 x 6 tokens. A whole image comes behind the tiles."""

_PARTS = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
_MARKS = ["<|im_start|>", "<|im_end|>", "<|video_pad|>"]
_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_TEXT = {"vocab_size": 288, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 8, **_HEADS}
_LONG = {"max_position_embeddings": 8192}
DECODERS: Mapping[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **_LONG},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 32, **_LONG},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "head_dim": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "norm_topk_prob": True,
        **_LONG,
    },
    # as InternVL2-4B: a window that is longer than any sequence
    "phi3": {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "sliding_window": 262144, **_LONG},
    # InternLM2 is Llama with other names, and heads of a group side by side; Llama itself in the reference
    "internlm2": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **_LONG},
}
"""Text configs by decoder, as far as they differ."""

_REMOTE_CODE = """from transformers import AutoConfig, PretrainedConfig


class InternVisionConfig(PretrainedConfig):
    model_type = "intern_vit_6b"


class InternLM2Config(PretrainedConfig):
    model_type = "internlm2"


class InternVLChatConfig(PretrainedConfig):
    model_type = "internvl_chat"
    is_composition = True

    def __init__(self, vision_config=None, llm_config=None, **kwargs):
        super().__init__(**kwargs)
        self.vision_config = InternVisionConfig(**(vision_config or {}))
        text = dict(llm_config or {})
        model_type = text.pop("model_type", "qwen2")
        own = InternLM2Config(**text) if model_type == "internlm2" else None
        self.llm_config = own or AutoConfig.for_model(model_type, **text)
"""


def write(path: Path, decoder: str = "qwen2") -> Path:
    """Makes one in Hugging Face's layout."""
    tokenizer = _tokenizer("<video>")
    ids = {"eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"), "bos_token_id": None, "pad_token_id": None}
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = InternVLConfig(
        vision_config={**vision, "image_size": [SIDE, SIDE], "patch_size": [14, 14], "attention_bias": True},
        text_config={**_TEXT, **ids, **DECODERS[decoder]},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=36,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = InternVLForConditionalGeneration(config)
    draw_weights(model)
    model.save_pretrained(path)
    size = {"height": SIDE, "width": SIDE}
    images, videos = GotOcr2ImageProcessor(size=size, max_patches=MOST_TILES), InternVLVideoProcessor(size=size)
    InternVLProcessor(images, tokenizer, videos, image_seq_length=36, chat_template=_CHAT).save_pretrained(path)
    return path


def write_chat(path: Path, plain: Path, decoder: str = "qwen2") -> Path:
    """The same model as `plain`, one of `write`, in OpenGVLab's layout."""
    path.mkdir()
    config = json.loads((plain / "config.json").read_text())
    vision, text = config["vision_config"], config["text_config"]
    if decoder == "internlm2":
        text |= {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "bias": False}
    shared = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps")
    own = {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "dtype": "float32",
        "llm_config": text,
        "vision_config": {name: vision[name] for name in shared}
        | {"image_size": SIDE, "patch_size": 14, "qkv_bias": True, "qk_normalization": False, "hidden_act": "gelu"}
        | {"norm_type": "layer_norm", "initializer_factor": 1.0},
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": SIDE,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": MOST_TILES,
        "ps_version": "v2",
        "select_layer": -1,
        "use_thumbnail": True,
    }
    (path / "config.json").write_text(json.dumps(own, indent=1))
    (path / "configuration_internvl_chat.py").write_text(_REMOTE_CODE)
    names = _NAMES | (_INTERNLM2_NAMES if decoder == "internlm2" else {})
    weights = _renamed(load_file(plain / "model.safetensors"), names)
    _join(weights, ("q", "k", "v"), "qkv", torch.cat)
    if decoder == "internlm2":
        _join(weights, ("wq", "wk", "wv"), "wqkv", _by_group)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    _tokenizer("<|spare|>").save_pretrained(path)  # `<video>` is text there, as `<image>` is
    return path


_NAMES = {
    "multi_modal_projector.layer_norm": "mlp1.0",
    "multi_modal_projector.linear_1": "mlp1.1",
    "multi_modal_projector.linear_2": "mlp1.3",
    "vision_tower.": "vision_model.",
    "encoder.layer.": "encoder.layers.",
    "cls_token": "class_embedding",
    "position_embeddings": "position_embedding",
    "patch_embeddings.projection": "patch_embedding",
    "attention.projection_layer": "attn.proj",
    "attention.q_proj": "attn.q",
    "attention.k_proj": "attn.k",
    "attention.v_proj": "attn.v",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "lambda_": "ls",
}
_INTERNLM2_NAMES = {
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""Names in Hugging Face's layout -> those in OpenGVLab's; as they stand here, one after the other."""


def _renamed(weights: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    renamed = {}
    for name, weight in weights.items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = weight.clone()
    return renamed


def _join(weights: dict[str, Tensor], parts: Sequence[str], name: str, join: Callable[[list[Tensor]], Tensor]) -> None:
    """Replaces the weights `LAYER.PART.*` of each layer by one, `LAYER.NAME.*`."""
    for first in [key for key in weights if f".{parts[0]}." in key]:
        each = [weights.pop(first.replace(f".{parts[0]}.", f".{part}.")) for part in parts]
        weights[first.replace(f".{parts[0]}.", f".{name}.")] = join(each).contiguous()


def _by_group(each: list[Tensor]) -> Tensor:
    """Queries of a group of heads, their keys, their values; group by group."""
    groups = _HEADS["num_key_value_heads"]
    return torch.cat([weight.view(groups, -1, *weight.shape[1:]) for weight in each], dim=1).flatten(0, 1)


def _tokenizer(video: str) -> Qwen2Tokenizer:
    vocabulary = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    parts = _PARTS | {"video_token": video}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], extra_special_tokens=parts)
    tokenizer.add_special_tokens({"additional_special_tokens": _MARKS})
    tokenizer.chat_template = _CHAT
    return tokenizer
