"""The measures of the studies.

Energy and distance follow section 3 of "FOLDER: Accelerating Multi-modal Large Language Models with Enhanced
Performance", which applies them to a ViT for classification.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

RATIOS = (0.25, 0.5, 0.66, 0.75, 0.9)


def kept_energy(energy: Tensor, tokens: int, ratios: Sequence[float] = RATIOS) -> Tensor:
    """Largest share of the energy that the tokens left at each ratio can hold (after FOLDER, Eq. 1-3).

    X = U diag(s) V^T are the (n, d) tokens after a block, not centred. The energy is E = sum of s_i^2 = |X|_F^2. With
    r = n - int(n ratio) tokens left, the share is (sum of the r largest s_i^2) / E: no matrix of rank r holds more of X
    (Eckart and Young).

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
    """Relative distance between the tower's output with and without merging (after FOLDER, Eq. 4).

    W(P, Q) = min over transports T of sum T_ij |x_i - y_j|, the exact earth mover's distance, divided by the mean
    |x_i|. P gives each of the n tokens x_i of the full output the weight 1/n; Q gives each merged token y_j its share
    of the patches.

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
    """Splits `StudiedModel.attention`, (layers, 2, 3), into the rows of VTW's figure 4; each row sums to 1."""
    return {"last": attention[:, 0].tolist(), "text": attention[:, 1].tolist()}
