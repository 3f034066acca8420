"""Steps as CUDA graphs replay them, decode steps as full ones, others in parts: from the tensors of their capture.

`graphs.py` stands in for the graphs. Attention is computed by torch from the tensors that FlashAttention reads: the
CPU's own plans each step in a tensor of its own.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.engine.cuda.graphs import FullGraphs, Piecewise, Pool
from tests.engine.withdrawal.harness import Case, Engine, words
from tests.engine.withdrawal.test_kept import CASES as CHOSEN
from tests.engine.withdrawal.test_positions import CASES as KEPT
from tests.engine.withdrawal.test_positions import K, KeepingExpected
from tests.engine.withdrawal.test_reference import MIXED

SIZES = [1, 2, 4, 8]
MIXED_SIZES = [*SIZES, 64, 200, 400, 700]
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


class GraphEngine(Engine):
    """Modification: full graphs of decode steps, and of the parts of the decoder in others, as on a GPU."""

    def __init__(self, path: Path, **options: Any) -> None:
        from vllm.config import CUDAGraphMode

        from foldserve.server.engine.withdrawal.graph import GraphBuffers
        from foldserve.server.engine.withdrawal.metadata import DeepMetadataBuilder

        super().__init__(path, K, **options)
        core = self.llm.llm_engine.engine_core.engine_core
        self.runner = runner = core.model_executor.driver_worker.worker.model_runner
        compilation = runner.vllm_config.compilation_config
        compilation.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
        compilation.cudagraph_capture_sizes, compilation.max_cudagraph_capture_size = MIXED_SIZES, MIXED_SIZES[-1]
        runner.cudagraph_dispatcher.initialize_cudagraph_keys(compilation.cudagraph_mode, 1)
        builders = [group.get_metadata_builder(0) for groups in runner.attn_groups for group in groups]
        for builder in builders:
            if isinstance(builder, DeepMetadataBuilder):
                builder._graph = GraphBuffers.of(runner.scheduler_config, runner.device)
        self.decoder = runner.model.language_model.model
        self.graph_pool = Pool()
        for name in ("shallow", "after_attention", "deep"):
            part = Piecewise(getattr(self.decoder, name), self.graph_pool)
            delattr(self.decoder, name)
            setattr(self.decoder, name, part)
        runner.model = self.graphs = FullGraphs(runner.model)
        self.capture()

    def capture(self) -> None:
        from vllm.config import CUDAGraphMode

        self.graphs.capturing = self.graph_pool.capturing = True
        for size in reversed(MIXED_SIZES):
            self.runner._dummy_run(size, CUDAGraphMode.PIECEWISE, is_graph_capturing=True)
        for size in reversed(SIZES):
            self.runner._dummy_run(size, CUDAGraphMode.FULL, uniform_decode=True, is_graph_capturing=True)
        self.graphs.capturing = self.graph_pool.capturing = False

    def replays(self, part: str) -> int:
        """Of its graphs, in steps with a prefill."""
        return getattr(self.decoder, part).replays.total()


@pytest.fixture
def engine(eight_layers: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    backend = "vllm.v1.attention.backends.cpu_attn"
    monkeypatch.setattr(f"{backend}.CPUAttentionBackendImpl.forward", attend)
    monkeypatch.setattr(f"{backend}.CPUAttentionBackendImpl.do_kv_cache_update", write)
    monkeypatch.setattr(f"{backend}.ops.cpu_attn_get_scheduler_metadata", lambda **kwargs: None)
    return GraphEngine(eight_layers, max_num_batched_tokens=MIXED_SIZES[-1])


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
    assert engine.replays("shallow") > engine.replays("deep") == engine.replays("after_attention") > 0
    for i, case in enumerate([*batches[0], *batches[2]]):
        engine.add(str(i), case, TOKENS)
        engine.step()
    outputs = [output for _ in range(2 * TOKENS) for output in engine.step() if output.finished]
    for output in outputs:
        expected.check(K, [*batches[0], *batches[2]][int(output.request_id)], output)
    engine.assert_all_blocks_free()
    assert_all_parts_replay_where_nobody_withdraws(engine)
    assert_buffers_are_needed(engine, expected)
    assert_token_ids_are_embedded_outside(engine, expected)


def assert_all_parts_replay_where_nobody_withdraws(engine: GraphEngine) -> None:
    before = {part: engine.replays(part) for part in ("shallow", "after_attention", "deep")}
    eager = engine.decoder.deep.eager
    for i, case in enumerate([MIXED[5], MIXED[3], replace(MIXED[5], photos=(3,))]):
        engine.add(f"ordinary {i}", case, TOKENS)
        engine.step()
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.step()
    assert {engine.replays(part) - count for part, count in before.items()} == {3}
    assert engine.decoder.deep.eager == eager


def assert_buffers_are_needed(engine: GraphEngine, expected: KeepingExpected) -> None:
    """A part that read the results of the one before would find what the pool holds now."""
    engine.decoder._between.hold = lambda **results: list(results.values())
    with pytest.raises(AssertionError):
        expected.generate(engine, K, [replace(MIXED[5], photos=(4,))], TOKENS)
    del engine.decoder._between.hold


def assert_token_ids_are_embedded_outside(engine: GraphEngine, expected: KeepingExpected) -> None:
    """A server that takes no images hands the model token ids: their embeddings are no tensor of the runner's."""
    engine.runner.supports_mm_inputs = False
    engine.capture()
    expected.generate(engine, K, [Case(f"USER: {words(seed, 40)} ASSISTANT:") for seed in (21, 22)], TOKENS)
    assert "embeds" in engine.decoder._between._buffers
