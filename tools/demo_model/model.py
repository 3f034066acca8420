"""LLaVA-1.5 in plain PyTorch for training; `export` maps its weights to the published names.

Attention is two batched products with an explicit softmax: on a CPU, the backward pass of PyTorch's fused attention is
several times slower at these sizes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foldserve.server.quality.demo.config import NORM_EPS
from foldserve.server.quality.demo_weights import Geometry

_ROPE_THETA = 10000.0

Rotation: TypeAlias = tuple[Tensor, Tensor]
"""Cosines and sines, each (batch, 1, tokens, head size)."""


class Masks(NamedTuple):
    """Additive attention masks: (P, P) for the prefix, (batch, 1, T, P + T) for the text."""

    prefix: Tensor
    text: Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """q (batch, heads, queries, size), k and v (batch, heads, keys, size) -> (batch, heads, queries, size)."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    out: Tensor = (scores if mask is None else scores + mask).softmax(-1) @ v
    return out


def _split(x: Tensor, heads: int) -> Tensor:
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def _join(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class VisionAttention(nn.Module):
    """CLIP's self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (_split(project(x), self.heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        out: Tensor = self.out_proj(_join(attend(q, k, v)))
        return out


class VisionMlp(nn.Module):
    """CLIP's MLP with quick GELU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.fc1(x)
        out: Tensor = self.fc2(inner * torch.sigmoid(1.702 * inner))
        return out


class VisionBlock(nn.Module):
    """One CLIP encoder layer."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        width = geometry.vision_hidden
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn = VisionAttention(width, geometry.vision_heads)
        self.mlp = VisionMlp(width, geometry.vision_intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class VisionTower(nn.Module):
    """CLIP's encoder up to the layer whose output LLaVA reads: the last but one."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        width, self.patch_size = geometry.vision_hidden, geometry.patch_size
        self.class_embedding = nn.Parameter(torch.randn(width) * 0.02)
        self.patch_embedding = nn.Linear(3 * self.patch_size**2, width, bias=False)  # CLIP's convolution
        self.position_embedding = nn.Parameter(torch.randn(geometry.patches + 1, width) * 0.02)
        self.pre_layrnorm = nn.LayerNorm(width)  # spelt so in CLIP
        self.layers = nn.ModuleList(VisionBlock(geometry) for _ in range(geometry.vision_layers - 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (batch, 3, side, side) -> (batch, patches, width)."""
        patches = F.unfold(pixels, self.patch_size, stride=self.patch_size).transpose(1, 2)
        x = self.patch_embedding(patches)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], 1) + self.position_embedding
        x = self.pre_layrnorm(x)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = x[:, 1:]
        return out


class Projector(nn.Module):
    """LLaVA-1.5's projector."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(geometry.vision_hidden, geometry.hidden_size)
        self.linear_2 = nn.Linear(geometry.hidden_size, geometry.hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.linear_2(F.gelu(self.linear_1(features)))
        return out


class RmsNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, NORM_EPS)


def rotation(positions: Tensor, size: int) -> Rotation:
    """RoPE of positions (batch, tokens), which may be fractions, for heads of `size`."""
    frequencies = _ROPE_THETA ** (-torch.arange(0, size, 2, device=positions.device) / size)
    angles = positions.float()[..., None] * frequencies
    angles = torch.cat([angles, angles], -1)[:, None]
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, rotation: Rotation) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * rotation[0] + torch.cat([-second, first], -1) * rotation[1]


class DecoderAttention(nn.Module):
    """Llama's attention over a shared prefix and packed text behind it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor, rotation: Rotation, masks: Masks) -> Tensor:
        q, k, v = (_split(project(x), self.heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = _rotate(q, rotation), _rotate(k, rotation)
        n = len(masks.prefix)
        prefix = attend(q[:, :, :n], k[:, :, :n], v[:, :, :n], masks.prefix)
        text = attend(q[:, :, n:], k, v, masks.text)
        out: Tensor = self.o_proj(_join(torch.cat([prefix, text], 2)))
        return out


class DecoderMlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DecoderBlock(nn.Module):
    """One Llama layer."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        width = geometry.hidden_size
        self.input_layernorm, self.post_attention_layernorm = RmsNorm(width), RmsNorm(width)
        self.self_attn = DecoderAttention(width, geometry.num_heads)
        self.mlp = DecoderMlp(width, geometry.intermediate_size)

    def forward(self, x: Tensor, rotation: Rotation, masks: Masks) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, masks)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Decoder(nn.Module):
    def __init__(self, geometry: Geometry, vocab_size: int) -> None:
        super().__init__()
        self.head_size = geometry.hidden_size // geometry.num_heads
        self.embed_tokens = nn.Embedding(vocab_size, geometry.hidden_size)
        self.layers = nn.ModuleList(DecoderBlock(geometry) for _ in range(geometry.num_layers))
        self.norm = RmsNorm(geometry.hidden_size)


class DemoLlava(nn.Module):
    """The whole model; its logits equal those of `LlavaForConditionalGeneration` on the exported checkpoint."""

    def __init__(self, geometry: Geometry, vocab_size: int) -> None:
        super().__init__()
        self.geometry = geometry
        self.vision = VisionTower(geometry)
        self.projector = Projector(geometry)
        self.decoder = Decoder(geometry, vocab_size)
        self.lm_head = nn.Linear(geometry.hidden_size, vocab_size, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            elif weight.dim() == 2 and "position" not in name:
                spread = 0.02 if "embed_tokens" in name or "lm_head" in name else weight.shape[1] ** -0.5
                if any(last in name for last in ("o_proj", "out_proj", "down_proj", "fc2")):
                    # Each of the 2 L additions to the residual stream starts small.
                    depth = len(self.decoder.layers) if name.startswith("decoder") else len(self.vision.layers)
                    spread /= math.sqrt(2 * depth)
                nn.init.normal_(weight, std=spread)

    def hidden_states(
        self,
        prefix: Tensor,
        features: Tensor,
        ids: Tensor,
        positions: Tensor,
        text_masks: Sequence[Tensor],
        read: Collection[int],
    ) -> dict[int, Tensor]:
        """Hidden states of the text behind prefix and image.

        Args:
            prefix: (p,) ids before the image.
            features: (batch, n, vision width) of the tower, in any order.
            ids: (batch, T) of the text.
            positions: (batch, p + n + T).
            text_masks: for each layer (batch, 1, T, p + n + T), additive.
            read: layers whose output is returned; 1 is the first.

        Returns:
            layer -> (batch, T, width), before the final norm.
        """
        embed, vision = self.decoder.embed_tokens, self.projector(features)
        x = torch.cat([embed(prefix).expand(len(ids), -1, -1), vision, embed(ids)], 1)
        n = x.shape[1] - ids.shape[1]
        causal = torch.full((n, n), -3e4, device=x.device).triu(1)
        turn = rotation(positions, self.decoder.head_size)
        found = {}
        for number, (layer, text_mask) in enumerate(zip(self.decoder.layers, text_masks, strict=True), start=1):
            x = layer(x, turn, Masks(causal, text_mask))
            if number in read:
                found[number] = x[:, n:]
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., width) hidden states -> (..., vocab)."""
        out: Tensor = self.lm_head(self.decoder.norm(hidden))
        return out
