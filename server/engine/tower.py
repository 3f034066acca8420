"""Runs vLLM's CLIP and SigLIP encoders layer by layer, with access between a layer's attention and its MLP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isqrt
from typing import TypeAlias

import torch
from torch import nn
from torch.nn import functional as F
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.model_executor.models.clip import CLIPEncoderLayer, CLIPVisionModel
from vllm.model_executor.models.siglip import SiglipEncoderLayer, SiglipVisionModel
from vllm.model_executor.models.vision import resolve_visual_encoder_outputs

from foldserve.reducers.attention import LayerAttention
from foldserve.reducers.downsample import interpolate_positions

_Layer: TypeAlias = CLIPEncoderLayer | SiglipEncoderLayer


class Tower:
    """The parts of a vision tower that reductions need.

    Args:
        model: vLLM's CLIP or SigLIP vision model, built up to the feature layer.
        select_strategy: `vision_feature_select_strategy` of the checkpoint.
    """

    def __init__(self, model: nn.Module, select_strategy: str) -> None:
        if not isinstance(model, CLIPVisionModel | SiglipVisionModel):
            raise TypeError(f"a CLIP or SigLIP tower is needed, this one is {type(model).__name__}")
        self._model, self._select_strategy = model, select_strategy
        self._inner = model.vision_model
        self._is_clip = isinstance(model, CLIPVisionModel)
        side = isqrt(self._inner.embeddings.num_patches)
        self._grid = (side, side)

    @property
    def layers(self) -> Sequence[_Layer]:
        return self._inner.encoder.layers

    @property
    def grid(self) -> tuple[int, int]:
        return self._grid

    @property
    def class_token(self) -> bool:
        return self._is_clip

    @property
    def patch_size(self) -> int:
        return self._inner.embeddings.patch_size

    def run(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The unchanged tower: (B, 3, H, W) -> features (B, n, C)."""
        return self._model(pixel_values, feature_select_strategy=self._select_strategy)

    def embed(
        self,
        pixel_values: torch.Tensor,
        grid: tuple[int, int] | None = None,
        places: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, 3, H, W) -> hidden states (B, n, C) before the first layer, a class token first.

        Args:
            grid: (rows, columns) of patches of resized pixels; position embeddings are interpolated.
            places: (n,) int64, on the device: the patches that enter; None: all.
        """
        embeddings = self._inner.embeddings
        if grid is None:
            hidden = embeddings(pixel_values)
        else:
            patches = embeddings.patch_embedding(pixel_values.to(embeddings.patch_embedding.weight.dtype))
            hidden = patches.flatten(2).transpose(1, 2)
            if self._is_clip:
                hidden = torch.cat([embeddings.class_embedding.expand(len(hidden), 1, -1), hidden], dim=1)
            positions = embeddings.position_embedding.weight
            hidden = hidden + interpolate_positions(positions, self._grid, *grid)
        if places is not None and self._is_clip:
            hidden = torch.cat([hidden[:, :1], hidden[:, 1:][:, places]], dim=1)
        elif places is not None:
            hidden = hidden[:, places]
        return self._inner.pre_layrnorm(hidden) if self._is_clip else hidden

    def finish(self, hidden: torch.Tensor, *, all_tokens: bool = False) -> torch.Tensor:
        """Hidden states (B, n, C) after the last layer -> features; of `all_tokens`, or those the tower selects."""
        return resolve_visual_encoder_outputs(
            hidden,
            self._inner.post_layernorm if self._is_clip else None,
            last_hs_proc=None if self._is_clip else self._inner.last_hs_proc,
            feature_select_strategy=None if all_tokens else self._select_strategy,
        )


def run_layer(layer: _Layer, hidden: torch.Tensor) -> torch.Tensor:
    """The unchanged layer, (B, n, C) -> (B, n, C). SigLIP's returns a pair and may overwrite its input."""
    out = layer(hidden)
    return out[0] if isinstance(out, tuple) else out


def attend(layer: _Layer, hidden: torch.Tensor, key_bias: torch.Tensor | None) -> tuple[torch.Tensor, LayerAttention]:
    """First half of a layer: (B, n, C) -> (B, n, C) after the attention's residual, and the attention.

    `key_bias` (B, n) is added to the logits of each key.
    """
    attention = layer.self_attn
    qkv, _ = attention.qkv_proj(layer.layer_norm1(hidden))
    query, key, value = qkv.chunk(3, dim=-1)  # (B, n, heads here * head_dim)
    heads = (attention.num_heads_per_partition, attention.head_dim)
    queries, keys = query.unflatten(-1, heads), key.unflatten(-1, heads)
    if key_bias is None:
        attended = attention.attn(query, key, value)
    else:  # vLLM's encoder attention takes no bias
        q, k, v = (x.transpose(1, 2) for x in (queries, keys, value.unflatten(-1, heads)))
        mask = key_bias[:, None, None, :].to(query.dtype)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=attention.scale)
        attended = attended.transpose(1, 2).flatten(2)
    projected, _ = attention.out_proj(attended)
    has_class_token = isinstance(layer, CLIPEncoderLayer)
    seen = LayerAttention(queries, keys, attention.scale, key_bias, class_token=has_class_token)
    if attention.tp_size > 1:
        seen = replace(seen, ranks=attention.tp_size, mean_over_ranks=mean_over_ranks)
    return hidden + projected, seen


def run_mlp(layer: _Layer, hidden: torch.Tensor) -> torch.Tensor:
    """Second half of a layer."""
    return hidden + layer.mlp(layer.layer_norm2(hidden))


def mean_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """Mean over tensor-parallel ranks, which have equally many heads; the same bits on all ranks."""
    return tensor_model_parallel_all_reduce(x) / get_tensor_model_parallel_world_size()
