"""Weights of small checkpoints: random values, published names."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def draw_weights(model: torch.nn.Module) -> None:
    """Larger than an initializer's, so that answers depend on images and positions."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                scale = 1.0 if "embed" in name else 1.5 / weight[0].numel() ** 0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
            elif name.endswith("bias"):
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
            elif name.endswith("A_log"):  # of recurrent layers: states that remember tens of tokens
                weight.copy_(-torch.rand(weight.shape, generator=generator) * 3 - 1)


def publish_tower_names(path: Path) -> None:
    """Name the towers' weights in a saved checkpoint `..._tower.vision_model...`, as published, for vLLM.

    transformers 5 saves towers of CLIP and SigLIP without `vision_model`.
    """
    file = path / "model.safetensors"
    weights = load_file(file)
    for name in list(weights):
        tower, dot, rest = name.partition("_tower.")
        if dot and not rest.startswith("vision_model."):
            weights[f"{tower}_tower.vision_model.{rest}"] = weights.pop(name)
    save_file(weights, file, metadata={"format": "pt"})
