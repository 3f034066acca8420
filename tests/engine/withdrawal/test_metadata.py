"""What a backend's metadata builder is given, and the fixed addresses that CUDA graphs read. On the CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from foldserve.server.engine.withdrawal.batch import BatchMaps
from foldserve.server.engine.withdrawal.core import TokenMap

BLOCK = 4
TEXT, IMAGE = TokenMap([], 10), TokenMap([(2, 8)], 10)


def common(computed: list[int], scheduled: list[int], padded_requests: int, padded_tokens: int) -> Any:
    """A full batch as vLLM's runners make it, with unused requests and rows at the end."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    unused = padded_requests - len(scheduled)
    starts = torch.tensor(np.cumsum([0, *scheduled, *[0] * unused]), dtype=torch.int32)
    lens = torch.tensor([c + n for c, n in zip(computed, scheduled, strict=True)] + [0] * unused, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lens,
        num_reqs=padded_requests,
        num_actual_tokens=padded_tokens,
        max_query_len=max(scheduled),
        max_seq_len=int(lens.max()),
        block_table_tensor=torch.arange(10, 10 + padded_requests * 8, dtype=torch.int32).view(padded_requests, 8),
        slot_mapping=torch.arange(padded_tokens),
        is_prefilling=torch.tensor([True] * len(scheduled) + [False] * unused),
    )


def compacted(maps: list[TokenMap], computed: list[int], scheduled: list[int], requests: int, tokens: int) -> Any:
    from foldserve.server.engine.withdrawal.metadata import DeviceBatch, compact

    batch = BatchMaps(maps).step(np.array(computed), np.array(scheduled))
    assert batch is not None
    device_batch = DeviceBatch.of(batch, torch.device("cpu"))
    return compact(common(computed, scheduled, requests, tokens), device_batch, BLOCK), device_batch


def test_rows_leave_and_requests_without_rows_too() -> None:
    deep, batch = compacted([TEXT, IMAGE, IMAGE], [0, 3, 0], [3, 4, 9], 3, 16)
    assert batch.rows.tolist() == [0, 1, 2, 7, 8, 15]
    assert deep.num_reqs == 2 and deep.num_actual_tokens == 6
    assert deep.query_start_loc.tolist() == deep.query_start_loc_cpu.tolist() == [0, 3, 6]
    assert deep.seq_lens.tolist() == deep.seq_lens_cpu_upper_bound.tolist() == [3, 3]
    assert (deep.max_query_len, deep.max_seq_len) == (3, 3)
    assert deep.block_table_tensor[:, 0].tolist() == [10, 26]
    assert deep.slot_mapping.tolist() == [40, 41, 42, 104, 105, 106]
    assert deep.is_prefilling.tolist() == [True, True]


def test_rows_stay_in_place_behind_an_image_padding_included() -> None:
    deep, batch = compacted([IMAGE, TEXT], [8, 0], [2, 3], 4, 8)
    assert batch.rows is None
    assert deep.query_start_loc.tolist() == [0, 2, 5, 5, 5] and deep.num_reqs == 4
    assert deep.seq_lens.tolist() == deep.seq_lens_cpu_upper_bound.tolist() == [4, 3, 0, 0]
    assert deep.slot_mapping.tolist() == [42, 43, 72, 73, 74, -1, -1, -1]


def test_single_tokens_stay_in_place_and_a_withdrawn_one_stores_nothing() -> None:
    deep, batch = compacted([IMAGE, IMAGE, TokenMap([(0, 9)], 10)], [12, 5, 3], [1, 1, 1], 4, 4)
    assert batch.rows is None
    assert deep.seq_lens.tolist() == [7, 2, 1, 0]
    assert deep.slot_mapping.tolist() == [11 * BLOCK + 2, -1, -1, -1]


@pytest.fixture
def builder() -> Any:
    """The deep builder of a made-up backend, which takes full CUDA graphs for any batch and returns its lengths."""
    from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, AttentionMetadataBuilder

    from foldserve.server.engine.withdrawal.graph import GraphBuffers
    from foldserve.server.engine.withdrawal.metadata import deep_backend

    class Builder(AttentionMetadataBuilder):
        _cudagraph_support = AttentionCGSupport.ALWAYS

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)

        def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
            return SimpleNamespace(seq_lens=common_attn_metadata.seq_lens)

    backend = type("MadeUpBackend", (AttentionBackend,), {"get_builder_cls": staticmethod(lambda: Builder)})
    assert deep_backend(backend) is deep_backend(backend)
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=4, max_num_batched_tokens=8))
    cpu = torch.device("cpu")
    made = deep_backend(backend).get_builder_cls()(SimpleNamespace(block_size=BLOCK), ["layer"], config, cpu)
    made._graph = GraphBuffers.of(config.scheduler_config, cpu)  # as on a GPU with full CUDA graphs
    return made


def test_full_cuda_graphs_only_for_single_tokens(builder: Any) -> None:
    from vllm.v1.attention.backend import AttentionCGSupport

    assert type(builder).get_cudagraph_support(None, None) is AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    assert not builder.supports_update_block_table


def test_capture_and_replay_use_the_same_addresses(builder: Any) -> None:
    from foldserve.server.engine.withdrawal.metadata import deep_step

    captured = builder.build(0, common([0, 0, 0, 0], [1, 1, 1, 1], 4, 4))
    group = SimpleNamespace(get_metadata_builder=lambda _: builder)
    batch = BatchMaps([IMAGE, TEXT]).step(np.array([12, 3]), np.array([1, 1]))
    with deep_step([[group]], batch):
        replayed = builder.build(0, common([12, 3], [1, 1], 4, 4))
    assert replayed.deep_rows is None
    assert captured.seq_lens.data_ptr() == replayed.seq_lens.data_ptr()
    assert captured.deep_slots.data_ptr() == replayed.deep_slots.data_ptr()
    assert captured.seq_lens.tolist() == [7, 4, 0, 0]
    assert captured.deep_slots.tolist() == [46, 75, -1, -1]
    assert builder.step is None


def test_without_withdrawn_tokens_the_backend_gets_vllms_batch(builder: Any) -> None:
    builder._graph = None
    full = common([0, 2], [3, 1], 2, 4)
    metadata = builder.build(0, full)
    assert metadata.deep_rows is None
    assert metadata.deep_slots is full.slot_mapping and metadata.seq_lens is full.seq_lens
