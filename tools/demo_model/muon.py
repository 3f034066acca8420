"""The optimizer Muon, which orthogonalises the momentum of a matrix (K. Jordan and others, 2024).

`torch.optim.Muon` does so matrix by matrix in bfloat16. On a CPU without bfloat16 units, one batched product of equal
shapes in fp32 takes a fraction of that time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # the quintic iteration of Muon's authors, five steps
_MOMENTUM = 0.95


def orthogonalise(matrices: Tensor) -> Tensor:
    """Makes all singular values of matrices (k, m, n) about 1, by Newton-Schulz iterations."""
    x = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    orthogonal: Tensor = x.mT if matrices.shape[1] > matrices.shape[2] else x
    return orthogonal


class Muon(Optimizer):
    """Muon with Nesterov momentum; all parameters of a group have the same shape."""

    def __init__(self, groups: Iterable[dict[str, Any]], weight_decay: float = 0.1) -> None:
        super().__init__(groups, {"lr": 0.02, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = group["params"]
            gradient = torch.stack([param.grad for param in params])
            state = self.state[params[0]]
            momentum = state.setdefault("momentum", torch.zeros_like(gradient))
            momentum.mul_(_MOMENTUM).add_(gradient)
            update = orthogonalise(gradient.add(momentum, alpha=_MOMENTUM))
            rows, columns = params[0].shape
            rate = group["lr"] * max(1, rows / columns) ** 0.5
            for param, direction in zip(params, update, strict=True):
                param.mul_(1 - group["lr"] / 20 * group["weight_decay"]).add_(direction, alpha=-rate)
