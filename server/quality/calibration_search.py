"""Where vision tokens may leave the decoder, as pure functions: Algorithm 1 of VTW ("Boosting Multimodal Large Language
Models with Visual Tokens Withdrawal for Rapid Inference").
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def kl_divergence(withdrawn: Tensor, full: Tensor) -> Tensor:
    """KL(P_withdrawn || P_full) in nats over the whole vocabulary, from logits (..., vocab) that broadcast; in fp32."""
    log_p = withdrawn.float().log_softmax(-1)
    log_q = full.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def first_layer_within(kl: Mapping[int, float], eta: float) -> int | None:
    """The first K whose mean KL (nats) is at most `eta`; None if there is none.

    The curve is not monotone, so every K is looked at, in order: a bisection may find another K or none.
    """
    return next((layer for layer in sorted(kl) if kl[layer] <= eta), None)
