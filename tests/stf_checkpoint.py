"""A LLaVA-STF checkpoint as its authors' code saves it: their tensor names and layout, their shapes scaled down."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sentencepiece import SentencePieceTrainer
from torch import Tensor

LAYERS = (23, 21, 18, 15, 12, 9, 6, 3)
BLOCKS, CHANNELS, HIDDEN, DECODER_LAYERS = 24, 64, 128, 2
VOCABULARY = 320

_TEXT = """What is in this picture? Describe the image in detail. USER: What do you see? ASSISTANT: A red house, a tree.
How many people are there? The quick brown fox jumps over the lazy dog. Yes, no, left, right, blue, green and yellow."""


def write(
    folder: Path, *, kernel: int = 2, experts: int = 1, image_size: int = 168, tower: bool = True, **config: object
) -> dict[str, Tensor]:
    """Writes config, tokenizer and weights (one `pytorch_model.bin`) into the new `folder`; returns the weights.

    Args:
        folder: to make.
        kernel: k.
        experts: E.
        image_size: in pixels; a patch has 14.
        tower: the checkpoint holds its vision tower.
        config: fields of config.json to set or change.
    """
    folder.mkdir(parents=True)
    weights = {
        **_draw(decoder_shapes(), seed=0),
        **_draw(projector_shapes(kernel, experts), seed=1),
    }
    if tower:
        weights |= {f"model.vision_tower.vision_tower.{name}": x for name, x in tower_weights(image_size).items()}
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(_config() | config))
    write_tokenizer(folder)
    return weights


def write_tower(folder: Path, *, image_size: int = 168) -> dict[str, Tensor]:
    """Writes the CLIP model as `openai/clip-vit-large-patch14-336` is published: its text half is there too."""
    folder.mkdir(parents=True)
    weights = tower_weights(image_size)
    others = {"logit_scale": torch.ones(()), "text_model.final_layer_norm.bias": torch.ones(4)}
    others["visual_projection.weight"] = torch.ones(4, CHANNELS)
    torch.save(weights | others, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(
        json.dumps({"model_type": "clip", "vision_config": tower_config(image_size), "text_config": {}})
    )
    return weights


def tower_weights(image_size: int) -> dict[str, Tensor]:
    """The tower's weights by their names in CLIP, `vision_model...`."""
    return _draw(_tower_shapes(image_size), seed=2)


def tower_config(image_size: int) -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": CHANNELS,
        "image_size": image_size,
        "intermediate_size": 4 * CHANNELS,
        "num_attention_heads": 2,
        "num_hidden_layers": BLOCKS,
        "patch_size": 14,
        "projection_dim": 32,
    }


def projector_shapes(kernel: int, experts: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """[4096, 8192], [1024, 4096], [16384, 4096], [4096, 16384] of the 7B checkpoint, with C = 64 for 1024."""
    c = CHANNELS
    yield from _linear("model.mm_projector_crosslayer.0", 4 * c, len(LAYERS) * c)
    yield from _linear("model.mm_projector_crosslayer.2", c, 4 * c)
    yield from _linear("model.mm_projector.0", 16 * c, kernel * kernel * c // experts)
    yield from _linear("model.mm_projector.2", HIDDEN, 16 * c)


def decoder_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    d, mlp = HIDDEN, 3 * HIDDEN
    yield "model.embed_tokens.weight", (VOCABULARY, d)
    for i in range(DECODER_LAYERS):
        layer = f"model.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{layer}.self_attn.{name}.weight", (d, d)
        yield f"{layer}.self_attn.rotary_emb.inv_freq", (d // 8,)  # saved by the transformers of that time
        yield f"{layer}.mlp.gate_proj.weight", (mlp, d)
        yield f"{layer}.mlp.up_proj.weight", (mlp, d)
        yield f"{layer}.mlp.down_proj.weight", (d, mlp)
        yield f"{layer}.input_layernorm.weight", (d,)
        yield f"{layer}.post_attention_layernorm.weight", (d,)
    yield "model.norm.weight", (d,)
    yield "lm_head.weight", (VOCABULARY, d)


def _tower_shapes(image_size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    c, root = CHANNELS, "vision_model"
    yield f"{root}.embeddings.class_embedding", (c,)
    yield f"{root}.embeddings.patch_embedding.weight", (c, 3, 14, 14)
    yield f"{root}.embeddings.position_embedding.weight", ((image_size // 14) ** 2 + 1, c)
    yield f"{root}.embeddings.position_ids", (1, (image_size // 14) ** 2 + 1)
    yield from _linear(f"{root}.pre_layrnorm", c)
    for i in range(BLOCKS):
        layer = f"{root}.encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{layer}.self_attn.{name}", c, c)
        yield from _linear(f"{layer}.mlp.fc1", 4 * c, c)
        yield from _linear(f"{layer}.mlp.fc2", c, 4 * c)
        yield from _linear(f"{layer}.layer_norm1", c)
        yield from _linear(f"{layer}.layer_norm2", c)
    yield from _linear(f"{root}.post_layernorm", c)


def _linear(name: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A linear layer, or with one size a layer norm."""
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _draw(shapes: Iterator[tuple[str, tuple[int, ...]]], seed: int) -> dict[str, Tensor]:
    """Random weights, twice what keeps a layer's output at the size of its input: the answer depends on the image."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes:
        x = torch.randn(shape, generator=generator)
        if "norm" in name or name.endswith(".bias"):
            x = 0.1 * x + ("norm" in name and name.endswith(".weight"))
        elif not any(part in name for part in ("embed_tokens", "class_embedding", "position", "inv_freq")):
            x *= 2 * x[0].numel() ** -0.5
        weights[name] = 2 * x if name == "lm_head.weight" else x
    return weights


def _config() -> dict[str, object]:
    """As LLaVA-1.5's code writes it."""
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "freeze_mm_mlp_adapter": False,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "image_aspect_ratio": "pad",
        "initializer_range": 0.02,
        "intermediate_size": 3 * HIDDEN,
        "max_length": 4096,
        "max_position_embeddings": 4096,
        "mm_hidden_size": CHANNELS,
        "mm_patch_merge_type": "flat",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "num_attention_heads": 4,
        "num_hidden_layers": DECODER_LAYERS,
        "num_key_value_heads": 4,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "tune_mm_mlp_adapter": False,
        "use_cache": True,
        "use_mm_proj": True,
        "vocab_size": VOCABULARY,
    }


def write_tokenizer(folder: Path) -> None:
    """A sentencepiece model with Llama's settings, and the two files beside it."""
    SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXT.splitlines() * 20),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            tokens
            | {"add_bos_token": True, "add_eos_token": False, "legacy": False, "model_max_length": 2048}
            | {"pad_token": None, "padding_side": "right", "tokenizer_class": "LlamaTokenizer"}
        )
    )
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens | {"pad_token": "<unk>"}))


def reshard(folder: Path, *, shards: int, safetensors: bool) -> None:
    """Splits the checkpoint's single file as `save_pretrained` does."""
    whole = folder / "pytorch_model.bin"
    weights = torch.load(whole, weights_only=True)
    whole.unlink()
    name = "model.safetensors" if safetensors else "pytorch_model.bin"
    stem, _, kind = name.partition(".")
    places = {tensor: f"{stem}-{i % shards + 1:05}-of-{shards:05}.{kind}" for i, tensor in enumerate(weights)}
    for file in set(places.values()):
        part = {tensor: weights[tensor] for tensor, place in places.items() if place == file}
        if safetensors:
            save_file(part, folder / file)
        else:
            torch.save(part, folder / file)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
