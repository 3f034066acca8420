"""Tensors at fixed addresses, which full CUDA graphs of decode steps read."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.config import SchedulerConfig
from vllm.v1.attention.backend import CommonAttentionMetadata


@dataclass(frozen=True, eq=False)
class GraphBuffers:
    """A graph is captured once and then reads the same addresses: every step that may replay it writes here first."""

    seq_lens: Tensor  # (max requests,) int32
    slots: Tensor  # (max tokens,) int64

    @classmethod
    def of(cls, scheduler: SchedulerConfig, device: torch.device) -> GraphBuffers:
        seq_lens = torch.zeros(scheduler.max_num_seqs, dtype=torch.int32, device=device)
        return cls(seq_lens, torch.full((scheduler.max_num_batched_tokens,), -1, device=device))

    def hold(self, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
        """The same metadata with its lengths and slots copied into the buffers."""
        common = copy(common)
        common.seq_lens = self.seq_lens[: len(common.seq_lens)].copy_(common.seq_lens)
        common.slot_mapping = self.slots[: len(common.slot_mapping)].copy_(common.slot_mapping)
        return common
