"""Algorithm 1 of VTW, "Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid Inference"."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def kl_divergence(withdrawn: Tensor, full: Tensor) -> Tensor:
    """KL(P_withdrawn || P_full) in nats, in fp32, from broadcastable logits (..., vocab)."""
    log_p = withdrawn.float().log_softmax(-1)
    log_q = full.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def first_layer_within(kl: Mapping[int, float], eta: float) -> int | None:
    """The first K whose mean KL is at most `eta`, or None. No bisection: the curve is not monotone."""
    return next((layer for layer in sorted(kl) if kl[layer] <= eta), None)
