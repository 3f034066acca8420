"""Decode steps as a full CUDA graph replays them: from the tensors, and with the Python values, of its capture.

A wrapper stands in for the graph. It calls the model with the arguments and the forward context of the capture, so
answers are right only if each step has written all that differs into the tensors seen then. Attention is computed by
torch from the tensors that FlashAttention reads: the CPU's own plans each step in a tensor of its own.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.engine.withdrawal.harness import Case, Engine
from tests.engine.withdrawal.test_kept import CASES as CHOSEN
from tests.engine.withdrawal.test_positions import CASES as KEPT
from tests.engine.withdrawal.test_positions import K, KeepingExpected
from tests.engine.withdrawal.test_reference import MIXED

SIZES = [1, 2, 4, 8]
TOKENS = 7


def write(impl: Any, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """Keys and values of the rows that have a slot, into (blocks, heads, block, 2 * head size)."""
    stored = slot_mapping >= 0
    block, place = slot_mapping[stored] // kv_cache.shape[2], slot_mapping[stored] % kv_cache.shape[2]
    kv_cache[block, :, place] = torch.cat([key, value], dim=-1)[: len(stored)][stored]


def attend(
    impl: Any,
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    attn_metadata: Any,
    output: Tensor,
    **unused: Any,
) -> Tensor:
    """Causal attention of each request's rows to its blocks."""
    if attn_metadata is None:
        return output
    starts, lens = attn_metadata.query_start_loc.tolist(), attn_metadata.seq_lens.tolist()
    for start, end, length, blocks in zip(starts, starts[1:], lens, attn_metadata.block_table, strict=False):
        if start == end:
            continue
        own = kv_cache[blocks[: -(-length // kv_cache.shape[2])]].transpose(0, 1).flatten(1, 2)[:, :length]
        keys, values = own.chunk(2, dim=-1)  # (heads, length, head size)
        seen = torch.ones(end - start, length, dtype=torch.bool).tril(length - (end - start))
        rows = query[start:end].transpose(0, 1)
        attended = F.scaled_dot_product_attention(rows, keys, values, seen, scale=impl.scale, enable_gqa=True)
        output.view(len(output), *rows.shape[::2])[start:end] = attended.transpose(0, 1)
    return output


class Graphs:
    """In the place of the model, as vLLM's `CUDAGraphWrapper`; counts replays by size."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._captured: dict[Any, tuple[Any, dict[str, Any]]] = {}
        self.capturing = True
        self.replays: Counter[int] = Counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, **inputs: Any) -> Any:
        from vllm.config import CUDAGraphMode
        from vllm.forward_context import get_forward_context, override_forward_context

        context = get_forward_context()
        if context.cudagraph_runtime_mode != CUDAGraphMode.FULL:
            return self._model(**inputs)
        if self.capturing:
            self._captured[context.batch_descriptor] = context, inputs
            return self._model(**inputs)
        self.replays[context.batch_descriptor.num_tokens] += 1
        captured, inputs = self._captured[context.batch_descriptor]
        with override_forward_context(captured):
            return self._model(**inputs)


class GraphEngine(Engine):
    """Modification: full graphs of decode steps, as on a GPU."""

    def __init__(self, path: Path, **options: Any) -> None:
        from vllm.config import CUDAGraphMode

        from foldserve.server.engine.withdrawal.graph import GraphBuffers
        from foldserve.server.engine.withdrawal.metadata import DeepMetadataBuilder

        super().__init__(path, K, **options)
        core = self.llm.llm_engine.engine_core.engine_core
        runner = core.model_executor.driver_worker.worker.model_runner
        compilation = runner.vllm_config.compilation_config
        compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
        compilation.cudagraph_capture_sizes, compilation.max_cudagraph_capture_size = SIZES, SIZES[-1]
        runner.cudagraph_dispatcher.initialize_cudagraph_keys(CUDAGraphMode.FULL_DECODE_ONLY, 1)
        builders = [group.get_metadata_builder(0) for groups in runner.attn_groups for group in groups]
        for builder in builders:
            if isinstance(builder, DeepMetadataBuilder):
                builder._graph = GraphBuffers.of(runner.scheduler_config, runner.device)
        runner.model = self.graphs = Graphs(runner.model)
        for size in reversed(SIZES):
            runner._dummy_run(size, CUDAGraphMode.FULL, uniform_decode=True, is_graph_capturing=True)
        self.graphs.capturing = False


@pytest.fixture
def engine(eight_layers: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    backend = "vllm.v1.attention.backends.cpu_attn"
    monkeypatch.setattr(f"{backend}.CPUAttentionBackendImpl.forward", attend)
    monkeypatch.setattr(f"{backend}.CPUAttentionBackendImpl.do_kv_cache_update", write)
    monkeypatch.setattr(f"{backend}.ops.cpu_attn_get_scheduler_metadata", lambda **kwargs: None)
    return GraphEngine(eight_layers, max_num_batched_tokens=700)


def test_replayed_steps_equal_the_reference(engine: GraphEngine, expected: KeepingExpected) -> None:
    """Withdrawn, chosen, kept and ordinary ones, in batches that fill a graph and others; prefills in between."""
    batches: list[list[Case]] = [
        [MIXED[0], MIXED[3], MIXED[6]],
        [MIXED[3]],
        [CHOSEN[3], CHOSEN[4], KEPT[0], KEPT[5], MIXED[0]],
        [MIXED[5], MIXED[3]],
        [MIXED[0], KEPT[5]],
    ]
    for cases in batches:
        expected.generate(engine, K, cases, TOKENS)
    assert all(engine.graphs.replays[size] >= TOKENS - 2 for size in SIZES)
    for i, case in enumerate([*batches[0], *batches[2]]):
        engine.add(str(i), case, TOKENS)
        engine.step()
    outputs = [output for _ in range(2 * TOKENS) for output in engine.step() if output.finished]
    for output in outputs:
        expected.check(K, [*batches[0], *batches[2]][int(output.request_id)], output)
    engine.assert_all_blocks_free()
