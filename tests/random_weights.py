"""Random weights of small checkpoints."""

from __future__ import annotations

import torch


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
