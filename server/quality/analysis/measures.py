"""What the studies compute of what they see.

The first two follow section 3 of "FOLDER: Accelerating Multi-modal Large Language Models with Enhanced Performance",
which made them on a ViT for classification. What is computed here is written out below, symbol by symbol.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

RATIOS = (0.25, 0.5, 0.66, 0.75, 0.9)


def kept_energy(energy: Tensor, tokens: int, ratios: Sequence[float] = RATIOS) -> Tensor:
    """Energy that the best matrix of as many rows as tokens stay can hold (after FOLDER, Eq. 1-3).

    With X = U diag(s) V^T, the (n, d) tokens after a block, the energy is E = sum of s_i^2 = |X|_F^2, and the share
    kept at rank r is E_r / E, E_r the sum of the r largest s_i^2: no r tokens span more of X (Eckart and Young).
    r = n - int(n ratio). X is not centred.

    Args:
        energy: (blocks, rank) squared singular values, descending.
        tokens: n.

    Returns:
        (blocks, ratios), in [0, 1].
    """
    shares = energy.double().cumsum(-1) / energy.double().sum(-1, keepdim=True)
    ranks = [min(tokens - int(tokens * ratio), energy.shape[-1]) for ratio in ratios]
    return shares[:, [rank - 1 for rank in ranks]]


def rank_for(energy: Tensor, share: float) -> Tensor:
    """(blocks,) int64: the lowest rank that holds `share` of the energy."""
    shares = energy.double().cumsum(-1) / energy.double().sum(-1, keepdim=True)
    return 1 + (shares < share).sum(-1)


def earth_movers_distance(full: Tensor, merged: Tensor, sizes: Tensor) -> float:
    """Distance of the tower's output with merging from its output without (after FOLDER, Eq. 4), without a unit.

    W(P, Q) = min over transports T of sum T_ij |x_i - y_j|, the exact earth mover's distance. P puts 1/n on each of
    the n tokens x_i of the full output, Q on each token y_j the share of patches that it stands for. Divided by the
    mean |x_i|: 1 is as far as from the tokens to zero.

    Args:
        full: (n, d).
        merged: (m, d).
        sizes: (m,), patches in each; they sum to n.
    """
    import ot  # type: ignore[import-untyped]

    x, y = full.double(), merged.double()
    cost = torch.cdist(x, y)
    mass = np.full(len(x), 1 / len(x)), (sizes.double() / sizes.sum()).numpy()
    distance = float(ot.emd2(*mass, cost.numpy()))
    return distance / float(x.norm(dim=-1).mean())


def by_part(attention: Tensor) -> Mapping[str, list[list[float]]]:
    """Attention by layer as in VTW's figure 4, from (layers, 2, 3); each row of three shares sums to 1.

    VTW is "Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid Inference". The shares are
    those of the tokens before the image, of the image, and of the tokens behind it.
    """
    return {"last": attention[:, 0].tolist(), "text": attention[:, 1].tolist()}
