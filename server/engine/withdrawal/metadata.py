"""Attention metadata of the deep layers, for any backend that vLLM selects.

The backend's own builder gets the compacted batch. Its result has three more attributes for the decoder: `deep_rows`,
the rows to gather (None: all); `deep_slots`, the KV slots of these rows; and `deep_prompts`, the prompts whose image
tokens are chosen in this step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    subclass_attention_backend_with_overrides,
)
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.worker.utils import AttentionGroup

from foldserve.reducers.withdraw import kv_slots
from foldserve.server.engine.withdrawal.batch import DeepBatch
from foldserve.server.engine.withdrawal.graph import GraphBuffers


@dataclass(frozen=True, eq=False)
class DeviceBatch:
    """A `DeepBatch` on the device, transferred in one copy; shared by all deep KV cache groups of a step."""

    host: DeepBatch
    rows: Tensor | None
    requests: Tensor | None
    request_of: Tensor
    positions: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor

    @classmethod
    def of(cls, batch: DeepBatch, device: torch.device) -> DeviceBatch:
        start_loc = np.concatenate([[0], np.cumsum(batch.query_lens)])
        optional = [part for part in (batch.rows, batch.requests) if part is not None]
        parts = [batch.request_of, batch.positions, start_loc, batch.seq_lens, *optional]
        packed = async_tensor_h2d(np.concatenate(parts), device=device)
        request_of, positions, starts, lens, *rest = packed.split([len(part) for part in parts])
        rows = rest.pop(0) if batch.rows is not None else None
        requests = rest.pop() if batch.requests is not None else None
        return cls(batch, rows, requests, request_of, positions, starts.int(), lens.int())


class DeepMetadataBuilder(AttentionMetadataBuilder[Any]):
    """Mixin before a backend's builder. Modifications:

    - `build` compacts the batch that `deep_step` announced; without one (dummy runs, graph capture, nothing withdrawn)
      it is the backend's;
    - never reuses another group's metadata (`supports_update_block_table`), whose slots are not compacted;
    - full CUDA graphs only for steps of one token per request, which drop no rows; their lengths and slots are at fixed
      addresses (`graph.py`).
    """

    supports_update_block_table = False
    step: DeviceBatch | None = None
    _graph: GraphBuffers | None = None

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
        **kwargs: Any,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, **kwargs)
        if device.type != "cpu" and vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs():
            self._graph = GraphBuffers.of(vllm_config.scheduler_config, device)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: AttentionSpec) -> AttentionCGSupport:
        own = super().get_cudagraph_support(vllm_config, kv_cache_spec)
        return min(own, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE, key=lambda support: support.value)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        common = common_attn_metadata
        if self.step is not None:
            common = compact(common, self.step, self.kv_cache_spec.block_size)
        rows = None if self.step is None else self.step.rows
        if self._graph is not None and rows is None:
            common = self._graph.hold(common)
        metadata = super().build(common_prefix_len, common, fast_build)
        metadata.deep_rows, metadata.deep_slots = rows, common.slot_mapping
        metadata.deep_prompts = () if self.step is None else self.step.host.prompts
        return metadata


def compact(full: CommonAttentionMetadata, step: DeviceBatch, block_size: int) -> CommonAttentionMetadata:
    """`full` as the deep layers see it. Only batches with all rows have padding (for CUDA graphs or compilation)."""
    host = step.host
    common = copy(full)
    common._num_computed_tokens_cache = common._token_to_req_indices_cache = None
    common.positions = common.mm_req_doc_ranges = None
    common.max_seq_len = int(host.seq_lens.max(initial=0))
    if step.requests is not None:
        common = _select_requests(common, step.requests, host)
    size = len(full.slot_mapping if step.rows is None else step.positions)
    common.slot_mapping = kv_slots(common.block_table_tensor, step.request_of, step.positions, block_size, size)
    if step.rows is None:
        common.seq_lens = _pad(step.seq_lens, full.num_reqs, 0)
        host_lens = _pad(torch.from_numpy(host.seq_lens).int(), full.num_reqs, 0)
    else:
        common.seq_lens = step.seq_lens
        common.query_start_loc = step.query_start_loc
        common.query_start_loc_cpu = torch.from_numpy(np.concatenate([[0], np.cumsum(host.query_lens)])).int()
        common.num_actual_tokens = len(host.positions)
        common.max_query_len = int(host.query_lens.max(initial=0))
        host_lens = torch.from_numpy(host.seq_lens).int()
    common.seq_lens_cpu_upper_bound = host_lens
    return common


def _select_requests(common: CommonAttentionMetadata, requests: Tensor, host: DeepBatch) -> CommonAttentionMetadata:
    """Drop requests without rows, since some backends do not support queries of length 0."""
    on_host = torch.from_numpy(host.requests)
    common.num_reqs = len(on_host)
    common.block_table_tensor = common.block_table_tensor[requests]
    if common.is_prefilling is not None:
        common.is_prefilling = common.is_prefilling[on_host.to(common.is_prefilling.device)]
    if common.req_idx is not None:
        common.req_idx = common.req_idx[host.requests]
    return common


def _pad(values: Tensor, size: int, value: int) -> Tensor:
    missing = size - len(values)
    return torch.nn.functional.pad(values, (0, missing), value=value) if missing else values


@lru_cache
def deep_backend(backend: type[AttentionBackend]) -> type[AttentionBackend]:
    """The backend with `DeepMetadataBuilder` before its own builder; one class per backend."""
    builder = backend.get_builder_cls()
    deep_builder = type(f"Deep{builder.__name__}", (DeepMetadataBuilder, builder), {})
    overrides = {"get_builder_cls": staticmethod(lambda: deep_builder)}
    return subclass_attention_backend_with_overrides("Deep", backend, overrides)


@contextmanager
def deep_step(attention_groups: Iterable[Iterable[AttentionGroup]], batch: DeepBatch | None) -> Iterator[None]:
    """Context in which the deep layers' builders build for `batch`."""
    builders = [group.get_metadata_builder(0) for groups in attention_groups for group in groups]
    deep = [builder for builder in builders if isinstance(builder, DeepMetadataBuilder)]
    step = DeviceBatch.of(batch, deep[0].device) if batch is not None and deep else None
    for builder in deep:
        builder.step = step
    try:
        yield
    finally:
        for builder in deep:
            builder.step = None
