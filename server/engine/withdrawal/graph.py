"""Tensors at fixed addresses for CUDA graphs."""

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
    """Inputs of full CUDA graphs of decode steps, which every step that may replay one writes first."""

    seq_lens: Tensor  # (max requests,) int32
    slots: Tensor  # (max tokens,) int64

    @classmethod
    def of(cls, scheduler: SchedulerConfig, device: torch.device) -> GraphBuffers:
        seq_lens = torch.zeros(scheduler.max_num_seqs, dtype=torch.int32, device=device)
        return cls(seq_lens, torch.full((scheduler.max_num_batched_tokens,), -1, device=device))

    def hold(self, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
        """The metadata with its lengths and slots copied into the buffers."""
        common = copy(common)
        common.seq_lens = self.seq_lens[: len(common.seq_lens)].copy_(common.seq_lens)
        common.slot_mapping = self.slots[: len(common.slot_mapping)].copy_(common.slot_mapping)
        return common


class PartBuffers:
    """Results passed from one part of the decoder to the next if each has its own (piecewise) CUDA graphs.

    vLLM frees the memory of a part's results after capture, so the next graph may overwrite them. They are copied to
    fixed addresses, which the next part's graph reads.
    """

    def __init__(self, compilation: CompilationConfig) -> None:
        self._compilation = compilation
        self._buffers: dict[str, Tensor] = {}

    def hold(self, **results: Tensor) -> list[Tensor]:
        """Copies of the tensors in the buffers of these names."""
        return [self._buffer(name, x)[: len(x)].copy_(x) for name, x in results.items()]

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        """(rows of the largest graph, width); never reallocated."""
        if name not in self._buffers:
            rows = self._compilation.max_cudagraph_capture_size
            assert rows is not None  # where there are graphs
            self._buffers[name] = like.new_empty(rows, like.shape[1])
        return self._buffers[name]


def replays_parts() -> bool:
    """Whether vLLM replays or captures piecewise CUDA graphs in this step."""
    return bool(get_forward_context().cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE)


@contextmanager
def no_graphs() -> Iterator[None]:
    """Run parts without CUDA graphs: vLLM selects graphs by the step's rows, but these parts have other rows."""
    context: ForwardContext = copy(get_forward_context())
    context.cudagraph_runtime_mode = CUDAGraphMode.NONE
    with override_forward_context(context):
        yield
