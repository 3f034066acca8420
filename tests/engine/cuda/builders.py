"""FlashAttention 3's and Triton's metadata builders under our mixin, on a platform that answers as an H100 does.

A full CUDA graph reads the tensors that it was captured with, so each of them has to stay where it was. FlashInfer is
left out: its builder does not import without the flashinfer package, which needs CUDA.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from foldserve.server.engine.withdrawal.batch import BatchMaps
from foldserve.server.engine.withdrawal.core import TokenMap

REQUESTS, TOKENS, BLOCKS, BLOCK, HEADS = 8, 64, 8, 16, 32
MAX_LEN = 512
IMAGE, TEXT = TokenMap([(2, 8)], 10), TokenMap([], 10)


@pytest.fixture(scope="module", autouse=True)
def h100() -> None:
    """Turns the platform of this process into one; stands in for FlashAttention's library."""
    import vllm.v1.worker.utils  # noqa: F401  # while vLLM still knows that this is a CPU
    from vllm.platforms import current_platform
    from vllm.platforms.interface import DeviceCapability

    platform: Any = type(current_platform)
    platform.is_cuda = platform.is_cuda_alike = lambda self: True
    platform.get_device_capability = classmethod(lambda cls, device_id=0: DeviceCapability(9, 0))
    platform.is_device_capability = classmethod(lambda cls, capability, device_id=0: capability in ((9, 0), 90))
    platform.is_device_capability_family = classmethod(lambda cls, capability, device_id=0: capability == 90)
    library: Any = ModuleType("vllm.vllm_flash_attn")
    library.flash_attn_interface = interface = ModuleType("vllm.vllm_flash_attn.flash_attn_interface")
    library.compile_flash_attn_varlen_func_from_specs = library.flash_attn_varlen_func = None
    library.get_scheduler_metadata = schedule
    vars(interface)["fa_version_unsupported_reason"] = lambda *args, **kwargs: None
    vars(interface)["is_fa_version_supported"] = lambda version, *args, **kwargs: version == 3
    sys.modules |= {library.__name__: library, interface.__name__: interface}
    sys.modules.pop("vllm.v1.attention.backends.fa_utils", None)  # it chose by the platform on import
    from vllm.v1.attention.backends import flash_attn, triton_attn

    for module in (flash_attn, triton_attn):
        vars(module)["get_num_attention_heads_from_layers"] = lambda config, layers: HEADS
    vars(flash_attn)["get_dcp_world_size_and_rank"] = lambda *args: (1, 0)
    vars(flash_attn)["_get_sliding_window_configs"] = lambda config: {(-1, -1)}


def schedule(*, batch_size: int, cache_seqlens: Tensor, **kwargs: Any) -> Tensor:
    """Of the size that FlashAttention 3 gives, with the lengths in it."""
    out = torch.zeros(1 + -(-batch_size // 4) * 16, dtype=torch.int32)
    out[1 : 1 + batch_size] = cache_seqlens
    return out


def config() -> Any:
    """What the builders read of vLLM's configuration."""
    from vllm.config import CUDAGraphMode

    return SimpleNamespace(
        model_config=SimpleNamespace(
            get_num_attention_heads=lambda parallel: HEADS,
            get_num_kv_heads=lambda parallel: HEADS,
            get_head_size=lambda: 128,
            rswa_window=None,
            is_mm_prefix_lm=False,
            hf_config=SimpleNamespace(model_type="llava"),
        ),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, cp_kv_cache_interleave_size=1, use_ubatching=False
        ),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        compilation_config=SimpleNamespace(
            cudagraph_mode=CUDAGraphMode.FULL_DECODE_ONLY,
            max_cudagraph_capture_size=REQUESTS,
            cudagraph_capture_sizes=[1, 2, 4, REQUESTS],
        ),
        attention_config=SimpleNamespace(flash_attn_max_num_splits_for_cuda_graph=32),
        scheduler_config=SimpleNamespace(max_num_seqs=REQUESTS, max_num_batched_tokens=TOKENS),
        kernel_config=SimpleNamespace(enable_jit_warmup=False),
        speculative_config=None,
    )


class Runner:
    """Persistent buffers of a model runner, and one deep builder."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder
        self._starts = torch.zeros(REQUESTS + 1, dtype=torch.int32)
        self._lens = torch.zeros(REQUESTS, dtype=torch.int32)
        self._slots = torch.zeros(TOKENS, dtype=torch.int64)
        self._table = torch.arange(1, 1 + REQUESTS * BLOCKS, dtype=torch.int32).view(REQUESTS, BLOCKS)

    def _common(
        self, computed: Sequence[int], scheduled: Sequence[int], requests: int, tokens: int, longest: int
    ) -> Any:
        from vllm.v1.attention.backend import CommonAttentionMetadata

        count = len(scheduled)
        self._starts[: requests + 1] = torch.tensor(np.cumsum([0, *scheduled, *[0] * (requests - count)]))
        self._lens.zero_()[:count] = torch.tensor(computed) + torch.tensor(scheduled)
        self._slots[:tokens] = torch.arange(100, 100 + tokens)
        return CommonAttentionMetadata(
            query_start_loc=self._starts[: requests + 1],
            query_start_loc_cpu=self._starts[: requests + 1].clone(),
            seq_lens=self._lens[:requests],
            num_reqs=requests,
            num_actual_tokens=tokens,
            max_query_len=max(scheduled),
            max_seq_len=longest,
            block_table_tensor=self._table[:requests],
            slot_mapping=self._slots[:tokens],
            seq_lens_cpu_upper_bound=self._lens[:requests].clone(),
            is_prefilling=torch.zeros(requests, dtype=torch.bool),
            positions=torch.arange(tokens),
        )

    def capture(self, requests: int) -> Any:
        common = self._common([0] * requests, [1] * requests, requests, requests, MAX_LEN)
        return self.builder.build_for_cudagraph_capture(common)

    def step(self, maps: list[TokenMap], computed: list[int], scheduled: list[int], requests: int, tokens: int) -> Any:
        from foldserve.server.engine.withdrawal.metadata import deep_step

        batch = BatchMaps(maps).step(np.array(computed), np.array(scheduled))
        group: Any = SimpleNamespace(get_metadata_builder=lambda _: self.builder)
        longest = max(np.array(computed) + np.array(scheduled))
        with deep_step([[group]], batch):
            return self.builder.build(0, self._common(computed, scheduled, requests, tokens, int(longest)))

    def decode(self, maps: list[TokenMap], computed: list[int], requests: int) -> Any:
        return self.step(maps, computed, [1] * len(maps), requests, requests)


@pytest.fixture(params=["flash_attn.FlashAttentionBackend", "triton_attn.TritonAttentionBackend"])
def runner(request: pytest.FixtureRequest) -> Runner:
    from importlib import import_module

    from foldserve.server.engine.withdrawal.graph import GraphBuffers
    from foldserve.server.engine.withdrawal.metadata import deep_backend
    from foldserve.server.engine.withdrawal.spec import DeepAttentionSpec

    module, name = request.param.split(".")
    backend = getattr(import_module(f"vllm.v1.attention.backends.{module}"), name)
    spec = DeepAttentionSpec(block_size=BLOCK, num_kv_heads=HEADS, head_size=128, dtype=torch.bfloat16)
    cpu, of_vllm = torch.device("cpu"), config()
    builder: Any = deep_backend(backend).get_builder_cls()(spec, ["layer"], of_vllm, cpu)
    builder._graph = GraphBuffers.of(of_vllm.scheduler_config, cpu)  # as on a GPU
    return Runner(builder)


def tensors(metadata: Any) -> dict[str, Tensor]:
    found = {name: value for name, value in fields(metadata).items() if isinstance(value, Tensor)}
    return found | {"deep_slots": metadata.deep_slots}


def fields(metadata: Any) -> dict[str, Any]:
    return {field.name: getattr(metadata, field.name) for field in dataclasses.fields(metadata)}


def assert_replays(captured: Any, now: Any) -> None:
    """All tensors are where a graph reads them, and all that it took as a number is as it was."""
    places = [
        {name: (tensor.data_ptr(), tensor.shape, tensor.stride()) for name, tensor in tensors(each).items()}
        for each in (captured, now)
    ]
    assert places[0] == places[1]
    assert {"seq_lens", "slot_mapping", "block_table", "query_start_loc"} <= places[0].keys()
    before, after = fields(captured), fields(now)
    differing = {name for name in before if not isinstance(before[name], Tensor) and before[name] != after[name]}
    assert differing <= {"max_seq_len"}  # of which the captured one is the largest there is
    assert now.max_seq_len <= captured.max_seq_len == MAX_LEN
    assert now.deep_rows is None and now.deep_prompts == ()


class Decode(NamedTuple):
    """A decode step, and what a graph should read in it.

    Attributes:
        slots: of each row; the i-th request has blocks 8 * i + 1, ...
    """

    maps: list[TokenMap]
    computed: list[int]
    seq_lens: list[int]
    slots: list[int]


STEPS = {
    "withdrawn, text": Decode([IMAGE, TEXT, IMAGE], [12, 3, 31], [7, 4, 26, 0], [22, 147, 297, -1]),
    "nothing withdrawn": Decode([TEXT, TEXT], [3, 9], [4, 10, 0, 0], [100, 101, 102, 103]),
    "a token that leaves": Decode([IMAGE] * 4, [4, 10, 20, 9], [2, 5, 15, 4], [-1, 148, 286, 403]),
}


def assert_reads(captured: Any, step: Decode) -> None:
    assert captured.seq_lens.tolist() == step.seq_lens
    assert captured.deep_slots.tolist() == captured.slot_mapping.tolist() == step.slots
    if captured.scheduler_metadata is not None:  # FlashAttention's
        assert captured.scheduler_metadata[1:5].tolist() == step.seq_lens


def test_graphs_read_each_step_where_they_were_captured(runner: Runner) -> None:
    captured = runner.capture(4)
    for step in [*STEPS.values(), *STEPS.values()]:
        assert_replays(captured, runner.decode(step.maps, step.computed, 4))
        assert_reads(captured, step)


@pytest.mark.parametrize("name", STEPS)
def test_graphs_read_the_right_step_after_a_prefill(runner: Runner, name: str) -> None:
    captured, other = runner.capture(4), runner.capture(8)
    prefill = runner.step([IMAGE, TEXT], [0, 0], [10, 5], 2, 15)
    assert prefill.deep_rows.tolist() == [0, 1, 8, 9, 10, 11, 12, 13, 14]
    step = STEPS[name]
    assert_replays(captured, runner.decode(step.maps, step.computed, 4))
    assert_reads(captured, step)
    assert_replays(other, runner.decode(step.maps, step.computed, 8))
    assert other.seq_lens.tolist() == step.seq_lens + [0] * 4


def test_a_prefill_is_compacted(runner: Runner) -> None:
    prefill = runner.step([IMAGE, TokenMap([(0, 9)], 12), TEXT], [0, 2, 1], [12, 4, 5], 3, 21)
    assert prefill.deep_rows.tolist() == [0, 1, 8, 9, 10, 11, 16, 17, 18, 19, 20]
    assert prefill.query_start_loc.tolist() == [0, 6, 11]
    assert prefill.seq_lens.tolist() == [6, 6]
    assert prefill.block_table[:, 0].tolist() == [1, 17]
    assert prefill.deep_slots.tolist() == [16, 17, 18, 19, 20, 21, 273, 274, 275, 276, 277]
    assert (prefill.num_actual_tokens, prefill.max_query_len, prefill.max_seq_len) == (11, 6, 6)
