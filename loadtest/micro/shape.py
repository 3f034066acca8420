"""The benchmarks' model, and the cost of its prefill and KV cache by formula."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from foldserve.server.quality import demo_model

DType = Literal["float32", "bfloat16"]
ITEM_BYTES: dict[DType, int] = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Shape:
    """A LLaVA-1.5 with multi-head attention, and prompts of one image and `text` other tokens."""

    layers: int = 16
    hidden: int = 1024
    image_px: int = 336
    text: int = 62
    withdraw_layer: int = 8
    dtype: DType = "bfloat16"

    @property
    def intermediate(self) -> int:
        """Width of the decoder's MLP, as in `demo_model`."""
        return self.hidden * 11 // 4

    @property
    def heads(self) -> int:
        return self.hidden // 64

    @property
    def vision(self) -> int:
        """Tokens of the image before reduction."""
        return (self.image_px // 14) ** 2

    def flops(self, vision: int, deep_vision: int) -> float:
        """FLOPs of the decoder over a prompt with `vision` tokens before layer K, `deep_vision` from K on."""
        deep = self.layers - self.withdraw_layer
        return self.withdraw_layer * self._layer_flops(vision) + deep * self._layer_flops(deep_vision)

    def _layer_flops(self, vision: int) -> float:
        """For s tokens: s (8 d^2 + 6 d f) for the linear layers, 2 s^2 d for causal attention."""
        s, d, f = self.text + vision, self.hidden, self.intermediate
        return s * (8 * d * d + 6 * d * f) + 2 * s * s * d

    def kv_bytes(self, text: int, vision: int, deep_vision: int) -> int:
        """4 d (L t + K n) in 16 bits, if all of n vision tokens leave at K; t text tokens, no rounding to blocks."""
        deep = self.layers - self.withdraw_layer
        tokens = self.layers * text + self.withdraw_layer * vision + deep * deep_vision
        return 2 * ITEM_BYTES[self.dtype] * self.hidden * tokens  # a key and a value

    def write(self, path: Path) -> Path:
        """Writes the checkpoint; its vision tower is minimal, since it is not measured."""
        return demo_model.create(
            path,
            image_size=self.image_px,
            hidden_size=self.hidden,
            num_layers=self.layers,
            num_heads=self.heads,
            vision_hidden=64,
            vision_layers=2,
            vision_heads=2,
            dtype=self.dtype,
        )

    def image(self) -> Image.Image:
        """Noise of a size that needs no resizing."""
        pixels = np.random.default_rng(0).integers(0, 256, (self.image_px, self.image_px, 3), dtype=np.uint8)
        return Image.fromarray(pixels)
