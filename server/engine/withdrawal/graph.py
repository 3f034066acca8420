"""Tensors at fixed addresses, which CUDA graphs read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.config import CompilationConfig, CUDAGraphMode, SchedulerConfig
from vllm.forward_context import ForwardContext, get_forward_context, override_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata


@dataclass(frozen=True, eq=False)
class GraphBuffers:
    """What full graphs of decode steps read.

    A graph is captured once and then reads the same addresses: every step that may replay it writes here first.
    """

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


class PartBuffers:
    """What a part of the decoder hands to the next where each has graphs of its own, vLLM's piecewise ones.

    vLLM lets the memory of a part's results go once the part is captured: they stay until the next graph runs, which
    may write to the same place. So they are copied, to where the next part's graph reads.
    """

    def __init__(self, compilation: CompilationConfig) -> None:
        self._compilation = compilation
        self._buffers: dict[str, Tensor] = {}

    def hold(self, **results: Tensor) -> list[Tensor]:
        """The same values, in the buffers of these names."""
        return [self._buffer(name, x)[: len(x)].copy_(x) for name, x in results.items()]

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        """(rows of the largest graph, width): it is never replaced."""
        if name not in self._buffers:
            rows = self._compilation.max_cudagraph_capture_size
            assert rows is not None  # where there are graphs
            self._buffers[name] = like.new_empty(rows, like.shape[1])
        return self._buffers[name]


def replays_parts() -> bool:
    """Whether vLLM has chosen piecewise graphs for this step, or is capturing them."""
    return bool(get_forward_context().cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE)


@contextmanager
def no_graphs() -> Iterator[None]:
    """Parts run without graphs, as they have to on other rows than the step has, which is what graphs are found by."""
    context: ForwardContext = copy(get_forward_context())
    context.cudagraph_runtime_mode = CUDAGraphMode.NONE
    with override_forward_context(context):
        yield
