"""Random weights of the demo model, under the names of the published LLaVA-1.5 checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from foldserve.server.quality.demo_tokenizer import TokenIds

# Standard deviation times sqrt(fan in), twice the variance-preserving value: with less, greedy decoding repeats one
# token whatever the image shows.
_GAIN = 2.0
# Gives logits a standard deviation of 4: tokens of logit 0 almost never occur, not even at temperature 1.
_HEAD_SCALE = 2.0

_Entry = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Geometry:
    """Sizes of the demo model; images and patches are square, in pixels."""

    image_size: int
    patch_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    vision_hidden: int
    vision_layers: int
    vision_heads: int

    def __post_init__(self) -> None:
        for part, whole in (
            ("patch_size", "image_size"),
            ("num_heads", "hidden_size"),
            ("vision_heads", "vision_hidden"),
        ):
            divisor, total = getattr(self, part), getattr(self, whole)
            if divisor < 1 or total < 1 or total % divisor:
                raise ValueError(f"{part} must divide {whole}, both at least 1: got {divisor} and {total}")
        if self.hidden_size // self.num_heads % 2:
            raise ValueError(f"hidden_size / num_heads must be even, got {self.hidden_size} / {self.num_heads}")
        if self.num_layers < 1 or self.vision_layers < 2:
            raise ValueError(
                "at least 1 decoder layer and 2 vision layers (features are taken from the last but one) are needed, "
                f"got {self.num_layers} and {self.vision_layers}"
            )

    @property
    def patches(self) -> int:
        """Vision tokens of one image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def intermediate_size(self) -> int:
        """Width of the decoder's MLP, about LLaMA's ratio."""
        return self.hidden_size * 11 // 4

    @property
    def vision_intermediate_size(self) -> int:
        """Width of the vision tower's MLP, CLIP's ratio."""
        return self.vision_hidden * 4


def random_weights(
    geometry: Geometry, ids: TokenIds, seed: int, dtype: Literal["float32", "bfloat16"]
) -> dict[str, Tensor]:
    """Draws every weight in float32, then casts it, so that both dtypes hold the same model.

    Norms are 1, biases 0. Output rows of tokens that no answer holds (`<image>`, padding, ...) are 0: they never win.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in _shapes(geometry, ids.vocab_size):
        weights[name] = _draw(name, shape, generator)
    head = weights["language_model.lm_head.weight"]
    readable = torch.zeros_like(head)
    readable[list(ids.answers)] = _HEAD_SCALE * head[list(ids.answers)]
    weights["language_model.lm_head.weight"] = readable
    return {name: weight.to(getattr(torch, dtype)) for name, weight in weights.items()}


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if "norm" in name or "layrnorm" in name:
        return torch.ones(shape)
    weight = torch.randn(shape, generator=generator)
    if "embed_tokens" in name or "class_embedding" in name or "position_embedding" in name:
        return weight
    fan_in = weight[0].numel()
    return weight.mul_(_GAIN * fan_in**-0.5)


def _shapes(geometry: Geometry, vocab_size: int) -> Iterator[_Entry]:
    yield from _vision_shapes(geometry)
    yield from _linear("multi_modal_projector.linear_1", geometry.hidden_size, geometry.vision_hidden)
    yield from _linear("multi_modal_projector.linear_2", geometry.hidden_size, geometry.hidden_size)
    yield from _decoder_shapes(geometry, vocab_size)


def _vision_shapes(geometry: Geometry) -> Iterator[_Entry]:
    root, d, patch = "vision_tower.vision_model", geometry.vision_hidden, geometry.patch_size
    yield f"{root}.embeddings.class_embedding", (d,)
    yield f"{root}.embeddings.patch_embedding.weight", (d, 3, patch, patch)
    yield f"{root}.embeddings.position_embedding.weight", (geometry.patches + 1, d)
    yield from _norm(f"{root}.pre_layrnorm", d)  # spelt so in CLIP
    for i in range(geometry.vision_layers):
        layer = f"{root}.encoder.layers.{i}"
        yield from _norm(f"{layer}.layer_norm1", d)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{layer}.self_attn.{projection}", d, d)
        yield from _norm(f"{layer}.layer_norm2", d)
        yield from _linear(f"{layer}.mlp.fc1", geometry.vision_intermediate_size, d)
        yield from _linear(f"{layer}.mlp.fc2", d, geometry.vision_intermediate_size)
    yield from _norm(f"{root}.post_layernorm", d)


def _decoder_shapes(geometry: Geometry, vocab_size: int) -> Iterator[_Entry]:
    root, d, mlp = "language_model.model", geometry.hidden_size, geometry.intermediate_size
    yield f"{root}.embed_tokens.weight", (vocab_size, d)
    for i in range(geometry.num_layers):
        layer = f"{root}.layers.{i}"
        yield f"{layer}.input_layernorm.weight", (d,)
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{layer}.self_attn.{projection}.weight", (d, d)
        yield f"{layer}.post_attention_layernorm.weight", (d,)
        yield f"{layer}.mlp.gate_proj.weight", (mlp, d)
        yield f"{layer}.mlp.up_proj.weight", (mlp, d)
        yield f"{layer}.mlp.down_proj.weight", (d, mlp)
    yield f"{root}.norm.weight", (d,)
    yield "language_model.lm_head.weight", (vocab_size, d)


def _norm(name: str, size: int) -> Iterator[_Entry]:
    yield f"{name}.weight", (size,)
    yield f"{name}.bias", (size,)


def _linear(name: str, rows: int, columns: int) -> Iterator[_Entry]:
    yield f"{name}.weight", (rows, columns)
    yield f"{name}.bias", (rows,)
