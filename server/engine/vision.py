"""The vision tower with token reduction: what a tower yields, and a walk through it that reduces per image.

Tensor code only; plans come from `foldserve.reducers.plan`, maths from `foldserve.reducers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import CLIPVisionConfig, PretrainedConfig, SiglipVisionConfig
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.model_executor.models.clip import CLIPEncoderLayer, CLIPVisionModel
from vllm.model_executor.models.vision import get_num_selected_vision_tokens, get_vision_encoder_info

from foldserve.reducers.folder import folder, folder_cls
from foldserve.reducers.plan import Plan


@dataclass(frozen=True, slots=True)
class VisionGeometry:
    """What one image costs at ratio 0, and how it may be reduced on this model.

    Attributes:
        tokens: vision tokens per image that reach the decoder without reduction.
        methods: names of the reducers that the tower supports; empty where foldserve cannot reduce.
    """

    tokens: int
    methods: frozenset[str]


def vision_geometry(hf_config: PretrainedConfig) -> VisionGeometry | None:
    """Geometry of a LLaVA-1.5-like model (fixed image size), or None for any other model."""
    if "LlavaForConditionalGeneration" not in (hf_config.architectures or ()):
        return None
    vision_config, strategy = hf_config.vision_config, hf_config.vision_feature_select_strategy
    if not isinstance(vision_config, CLIPVisionConfig | SiglipVisionConfig):
        return None
    encoder = get_vision_encoder_info(hf_config)
    side = encoder.get_image_size()
    tokens = get_num_selected_vision_tokens(encoder.get_num_image_tokens(image_width=side, image_height=side), strategy)
    has_cls = isinstance(vision_config, CLIPVisionConfig) and strategy == "default"
    return VisionGeometry(tokens, frozenset({"folder", "folder_cls"} if has_cls else {"folder"}))


def encode_images(
    tower: nn.Module, pixel_values: torch.Tensor, plans: Sequence[Plan], select_strategy: str
) -> list[torch.Tensor]:
    """Runs the tower once over the whole batch and reduces each image by its own plan.

    Args:
        tower: vLLM's CLIP or SigLIP vision model, built up to the feature layer.
        pixel_values: (B, 3, H, W).
        plans: B plans; images with equal plans are reduced together.
        select_strategy: `vision_feature_select_strategy` of the checkpoint.

    Returns:
        B tensors (plan.kept, C), in the order of the images.
    """
    if not any(plan.method == "folder_cls" for plan in plans):
        return _reduce_features(tower(pixel_values, feature_select_strategy=select_strategy), plans)
    hidden, last = _run_to_last_layer(tower, pixel_values)
    in_tower = [i for i, plan in enumerate(plans) if plan.method == "folder_cls"]
    outside = [i for i, plan in enumerate(plans) if plan.method != "folder_cls"]
    features: list[torch.Tensor | None] = [None] * len(plans)
    folded = _last_layer_folded(last, _rows(hidden, in_tower), [plans[i] for i in in_tower])
    for i, image in zip(in_tower, folded, strict=True):
        features[i] = image
    if outside:
        plain = last(_rows(hidden, outside))[:, 1:]  # CLS is dropped: `default` strategy, see vision_geometry
        reduced = _reduce_features(plain, [plans[i] for i in outside])
        for i, image in zip(outside, reduced, strict=True):
            features[i] = image
    return [image for image in features if image is not None]


def _reduce_features(features: torch.Tensor, plans: Sequence[Plan]) -> list[torch.Tensor]:
    """`folder` on the selected features, (B, n, C) -> B x (kept, C)."""
    out = list(features)
    for plan, members in _by_plan(plans).items():
        if plan.removed:
            reduced = folder(_rows(features, members), plan.folds, scale=plan.scale).tokens
            for i, image in zip(members, reduced, strict=True):
                out[i] = image
    return out


def _run_to_last_layer(tower: nn.Module, pixel_values: torch.Tensor) -> tuple[torch.Tensor, CLIPEncoderLayer]:
    """Hidden states (B, n+1, C) that enter the last built layer, and that layer."""
    if not isinstance(tower, CLIPVisionModel):
        raise TypeError(f"folder_cls needs a CLIP tower with a class token, this one is {type(tower).__name__}")
    model = tower.vision_model
    hidden: torch.Tensor = model.pre_layrnorm(model.embeddings(pixel_values))
    *layers, last = model.encoder.layers
    for layer in layers:
        hidden = layer(hidden)
    return hidden, last


def _last_layer_folded(layer: CLIPEncoderLayer, hidden: torch.Tensor, plans: Sequence[Plan]) -> list[torch.Tensor]:
    """The CLIP layer with `folder_cls` between the attention residual and LN2/MLP, which see the reduced sequence."""
    attention = layer.self_attn
    qkv, _ = attention.qkv_proj(layer.layer_norm1(hidden))
    query, key, value = qkv.chunk(3, dim=-1)  # (B, n+1, heads here * head_dim)
    attended, _ = attention.out_proj(attention.attn(query, key, value))
    hidden = hidden + attended

    heads = (attention.num_heads_per_partition, attention.head_dim)
    keys = key.unflatten(-1, heads)  # (B, n+1, heads, head_dim)
    cls_query = query[:, 0].unflatten(-1, heads)  # (B, heads, head_dim)
    logits = torch.einsum("bhd,bnhd->bhn", cls_query.float(), keys.float()) * attention.scale
    keys_mean = _mean_over_heads(keys.float(), dim=2, tp_size=attention.tp_size)  # (B, n+1, head_dim)
    cls_attention = _mean_over_heads(logits.softmax(-1), dim=1, tp_size=attention.tp_size)  # (B, n+1)

    out: list[torch.Tensor] = [hidden[i] for i in range(len(plans))]
    for plan, members in _by_plan(plans).items():
        tokens = folder_cls(
            _rows(hidden, members), _rows(keys_mean, members), _rows(cls_attention, members), plan.folds
        ).tokens
        tokens = tokens + layer.mlp(layer.layer_norm2(tokens))
        for i, image in zip(members, tokens, strict=True):
            out[i] = image
    return out


def _mean_over_heads(x: torch.Tensor, dim: int, tp_size: int) -> torch.Tensor:
    """Mean over all heads of the model, wherever tensor parallelism put them; equal on all ranks."""
    mean = x.mean(dim)
    if tp_size == 1:
        return mean
    reduced: torch.Tensor = tensor_model_parallel_all_reduce(mean) / get_tensor_model_parallel_world_size()
    return reduced


def _by_plan(plans: Sequence[Plan]) -> dict[Plan, list[int]]:
    groups: dict[Plan, list[int]] = {}
    for i, plan in enumerate(plans):
        groups.setdefault(plan, []).append(i)
    return groups


def _rows(x: torch.Tensor, members: Sequence[int]) -> torch.Tensor:
    """x[members] without an index tensor: that would be a host-to-device copy per group."""
    if len(members) == len(x):
        return x
    return torch.stack([x[i] for i in members])
