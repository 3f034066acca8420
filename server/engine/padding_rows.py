"""Padding rows of the vocabulary, which have no token in the tokenizer: `foldserve serve` never samples them."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.worker.gpu.sample import logits_processor as v2

from foldserve.server.settings import Settings


class PaddingRows(LogitsProcessor):
    """Sets the logits of the rows `index` to -inf. vLLM computes log-probabilities before, so they cover all rows."""

    def __init__(self, index: torch.Tensor) -> None:
        self._index = index

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill_(-1, self._index, -torch.inf)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Nothing: no state depends on requests."""


class PaddingRowsV2(v2.LogitsProcessor):
    """`PaddingRows` for model runner V2."""

    def __init__(self, index: torch.Tensor) -> None:
        self._index = index

    def apply(self, logits: torch.Tensor, ctx: v2.LogitsContext) -> torch.Tensor:
        return logits.index_fill_(-1, self._index, -torch.inf)


class MaskingRunner:
    """Mixin before a V1 runner class. Modification: padding rows are never sampled if the configuration says so."""

    def __init__(self: Any, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)  # type: ignore[call-arg]
        if rows := masked_rows(vllm_config):
            # Not through vLLM's option for logits processors, which would copy every output token to the host.
            mask = PaddingRows(torch.tensor(rows, device=device))
            self.input_batch.logitsprocs.non_argmax_invariant.append(mask)


def masked_rows(vllm_config: VllmConfig) -> list[int]:
    asked = Settings.from_config(vllm_config.additional_config).masks_padding_rows
    return unknown_rows(vllm_config.model_config) if asked else []


def unknown_rows(model_config: ModelConfig) -> list[int]:
    """Ids of the model's vocabulary that its tokenizer does not have; empty without a tokenizer."""
    if model_config.skip_tokenizer_init:
        return []
    known = set(cached_tokenizer_from_config(model_config).get_vocab().values())
    return [row for row in range(model_config.get_vocab_size()) if row not in known]
