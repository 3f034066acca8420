"""VTW: Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid Inference."""

from __future__ import annotations

from foldserve.reducers.method import Decoder


class Withdraw(Decoder):
    """All vision tokens leave at layer K. The work is done where the KV cache is, in the engine."""

    name = "withdraw"
    summary = "Drops all vision tokens from the decoder's layers from K on, and their KV cache with them (VTW)."
    paper = "Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid Inference"

    def removed(self, tokens: int, ratio: float | None) -> int:
        return tokens
