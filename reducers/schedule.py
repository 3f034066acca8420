"""How many tokens each step of a method removes."""

from __future__ import annotations

from functools import lru_cache
from math import ceil


@lru_cache(maxsize=4096)
def fold_schedule(tokens: int, removed: int) -> tuple[int, ...]:
    """Tokens that each fold of FOLDER removes, to remove `removed` in total.

    One fold removes at most (tokens - 1) // 2, as in the authors' code (the paper says floor(tokens / 2)). The rest
    goes to the next fold, the paper's "reduction overflow".

    Raises:
        ValueError: fewer than two tokens would stay.
    """
    if not 0 <= removed <= max(tokens - 2, 0):
        raise ValueError(f"cannot fold {removed} of {tokens} tokens away: between 0 and {max(tokens - 2, 0)} can go")
    folds = []
    while removed:
        folds.append(min((tokens - 1) // 2, removed))
        tokens -= folds[-1]
        removed -= folds[-1]
    return tuple(folds)


def even_schedule(removed: int, layers: int) -> tuple[int, ...]:
    """The same number in every layer, and a remainder one by one in the first layers."""
    each, more = divmod(removed, layers)
    return (each + 1,) * more + (each,) * (layers - more)


def least_ratio(tokens: int, kept: int) -> float:
    """The smallest ratio with four digits that leaves `kept` tokens."""
    return ceil(1e4 * (tokens - kept) / tokens) / 1e4
