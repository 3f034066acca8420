"""Qwen3.5: Qwen3-VL's images and videos before a decoder of which most layers keep a recurrent state.

vLLM's kernels of these layers for CPUs take bf16 only: where answers are those of plain transformers, which needs fp32,
`gated_delta` computes them. In bf16 answers are those of vLLM's own model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import EngineArgs, ModelRegistry, SamplingParams
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, Qwen3_5ForConditionalGenerationConfig

from foldserve.reducers.plan import InvalidReduction
from foldserve.server.engine import refused_options, withdrawal
from foldserve.server.engine.facts.kv import KvGroup, kv_facts
from foldserve.server.engine.kv_cost import KvCost, kv_cost
from foldserve.server.engine.plugin import register
from tests.engine import gated_delta
from tests.engine.conftest import MAX_TOKENS, Case, greedy, start_engine
from tests.engine.method_table import assert_documented
from tests.engine.qwen_reference import Answer, QwenReference
from tests.engine.test_qwen import (  # fixtures among them
    FILMS,
    RENUMBER,
    SIZES,
    WrongRow,
    ask,
    assert_different,
    assert_same,
    checkpoint,
    expect,
    one_image,
    reference,
    two_images,
)
from tests.engine.watch import forget, watch

__all__ = ["checkpoint", "expect", "reference"]

pytestmark = pytest.mark.parametrize("checkpoint", ["qwen3_5"], indirect=True)

BLOCK = 32
OPTIONS: dict[str, Any] = {
    "max_model_len": 1024,
    "max_num_batched_tokens": 80,
    "max_num_seqs": 8,
    "scheduler_cls": "foldserve.server.engine.scheduler.make_scheduler",
}
"""Most images are cut, at the end of a block, where vLLM may cache states."""

ONE: dict[str, Any] = {"method": "illava", "layers": [1]}
TWO: dict[str, Any] = {"method": "illava", "layers": [1, 2]}
IN_THE_TOWER = [
    one_image(*SIZES[0], method="illava", layers=[1], ratio=0.5),
    one_image(*SIZES[1], **TWO, ratio=0.77),
    one_image(*SIZES[2], method="tome", ratio=0.4, positions="renumber"),
    two_images({"ratio": 0.5}, {**ONE, "ratio": 0.77}),
    two_images({**TWO, "ratio": 0.5}, {}),
]
OTHERS = [
    Case(ask("hello there")),
    one_image(*SIZES[0]),
    one_image(*SIZES[0], ratio=0.5),
    one_image(*SIZES[1], ratio=0.77),
    one_image(*SIZES[2], ratio=0.77, positions="renumber"),
    two_images({}, {}),
    two_images({"ratio": 0.77}, {"ratio": 0.5, **RENUMBER}),
    one_image(*SIZES[0], method="random", ratio=0.6),
    one_image(*SIZES[1], method="mmtok", ratio=0.6, query="what is it?"),
    one_image(*SIZES[2], method="pool", ratio=0.7),
    one_image(*SIZES[0], method="pool", ratio=0.7, positions="keep"),
    one_image(*SIZES[0], keep_tokens=10),
    one_image(*SIZES[1], method="downsample", ratio=0.75, positions="keep"),
    two_images({"method": "downsample", "ratio": 0.66}, {"ratio": 0.5}),
]


@pytest.fixture(scope="module", autouse=True)
def in_fp32() -> None:
    gated_delta.install()


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Any:
    return start_engine(checkpoint, **OPTIONS)


def test_all_in_one_batch_and_again_from_the_cache(llm: Any, expect: Callable[[Case], Answer]) -> None:
    for _ in range(2):
        assert_same(llm, expect, OTHERS)


def test_in_the_tower_beside_others(llm: Any, expect: Callable[[Case], Answer]) -> None:
    assert_same(llm, expect, IN_THE_TOWER + OTHERS[:3])


def test_where_few_blocks_are_free_requests_begin_again(checkpoint: Path, expect: Callable[[Case], Answer]) -> None:
    llm = start_engine(checkpoint, **OPTIONS | {"max_model_len": 256, "num_gpu_blocks_override": 24})
    with watch(llm) as seen:
        assert_same(llm, expect, OTHERS)
    assert seen.preempted


def test_videos_frame_by_frame(llm: Any, reference: QwenReference) -> None:
    films = [FILMS[i] for i in (0, 1, 2, 4, 6, 10, 12)]
    for _ in range(2):
        for case, (tokens, logprobs) in zip(films, greedy(llm, films), strict=True):
            asked = [(case.film, case.asked)]
            want, expected = reference.generate(case.prompt, case.images, case.reductions, MAX_TOKENS, asked)
            assert tokens == want, case.asked
            assert logprobs == pytest.approx(expected, abs=2e-5)


def test_states_are_found_again(llm: Any) -> None:
    """At the last end of a block in a prompt, and where prompts part, once vLLM has seen them do so."""
    forget(llm)

    def cached(second: float) -> tuple[int, int]:
        case = two_images({"ratio": 0.5}, {"ratio": second})
        (output,) = llm.generate([case.to_vllm()], SamplingParams(max_tokens=1), use_tqdm=False)
        return output.num_cached_tokens, len(output.prompt_token_ids)

    assert cached(0.5)[0] == 0
    hit, length = cached(0.5)
    assert hit == (length - 1) // BLOCK * BLOCK
    assert cached(0.75)[0] == 0
    assert cached(0.6)[0] == BLOCK


def test_the_reference_tells_wrong_positions(
    llm: Any, expect: Callable[[Case], Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model
    monkeypatch.setattr(model.family, "position_map", lambda features: WrongRow.of(model.family, features))
    forget(llm)
    assert_different(llm, expect, OTHERS[3])


def test_the_reference_tells_a_state_of_another_request(
    llm: Any, expect: Callable[[Case], Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of whoever had its block before, where a prompt begins."""
    forget(llm)
    monkeypatch.setattr(gated_delta, "continues", lambda step: [True] * (step.num_decodes + step.num_prefills))
    assert_different(llm, expect, OTHERS[3])


@pytest.mark.parametrize(
    ("reduction", "param"),
    [
        ({"withdraw": True}, "withdraw"),
        ({"ratio": 0.5, "withdraw": True}, "withdraw"),
        ({"method": "fastv", "ratio": 0.5}, "method"),
        ({**ONE, "ratio": 0.5, "decoder": True}, "method"),
    ],
    ids=str,
)
def test_nothing_leaves_in_the_decoder(llm: Any, reduction: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidReduction, match="a recurrent state, which can't forget tokens") as caught:
        llm.generate([one_image(*SIZES[0], **reduction).to_vllm()], use_tqdm=False)
    assert caught.value.param == param


def test_a_layer_k_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="--withdraw-layer does not go with this model's decoder: some layers keep"):
        start_engine(checkpoint, **withdrawal.configure(4, device="cpu"))


def test_a_dtype_that_a_cpu_has_no_kernels_for_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refused_options, "RECURRENT_ON_CPU", (torch.bfloat16,))
    with pytest.raises(ValueError, match="in bfloat16 only on a CPU, and float32 was asked for: start with --dtype bf"):
        start_engine(checkpoint)


def test_vllms_own_settings_of_the_model_stay(checkpoint: Path) -> None:
    """The type of the states, that the checkpoint's config names. Twice registered, the hook is the same."""
    hook = MODELS_CONFIG_MAP["Qwen3_5ForConditionalGeneration"]
    register()
    assert MODELS_CONFIG_MAP["Qwen3_5ForConditionalGeneration"] is hook
    assert issubclass(hook, Qwen3_5ForConditionalGenerationConfig)
    args = EngineArgs(str(checkpoint), hf_overrides={"text_config": {"mamba_ssm_dtype": "bfloat16"}}, dtype="float32")
    assert args.create_engine_config().cache_config.mamba_ssm_cache_dtype == "bfloat16"


def test_what_a_sequence_costs(checkpoint: Path) -> None:
    """Keys and values in two layers of eight; six states of fp32, and three inputs of each channel."""
    config = EngineArgs(str(checkpoint), dtype="float32", enforce_eager=True).create_engine_config()
    state = 4 * (2 * 64 * 64 + 3 * (64 + 64 + 2 * 64))
    assert kv_cost(config, None) == KvCost(2 * 4 * 64 * 4, 2, None, 6 * state)


def test_what_doctor_says_of_the_cache_is_so(llm: Any, checkpoint: Path) -> None:
    """One largest image of 256 tokens, and 64: ten blocks, and in each other group a state, and the one before it."""
    pool: dict[str, Any] = {"kv_cache_memory_bytes": 64 << 20, "block_size": BLOCK, "max_model_len": 1024}
    facts = kv_facts(EngineArgs(str(checkpoint), dtype="float32", enforce_eager=True, **pool).create_engine_config())
    assert facts is not None and facts.block_tokens == BLOCK
    assert facts.groups == (*[KvGroup("recurrent", 2)] * 3, KvGroup("all", 2))
    assert facts.sequences == (llm.llm_engine.vllm_config.cache_config.num_gpu_blocks - 1) // (10 + 3 * 2)


def test_in_bf16_ratio_0_is_vllms_own_bit_for_bit(checkpoint: Path) -> None:
    """On vLLM's kernels, those of recurrent layers among them."""
    architecture = "Qwen3_5ForConditionalGeneration"
    ModelRegistry.register_model(f"Stock{architecture}", f"vllm.model_executor.models.qwen3_5:{architecture}")
    plain = [one_image(*size) for size in SIZES] + [two_images({}, {})]
    overrides = {"architectures": [f"Stock{architecture}"]}
    stock = start_engine(checkpoint, dtype="bfloat16", hf_overrides=overrides, worker_cls="auto", **OPTIONS)
    expected = greedy(stock, [replace(case, reductions=()) for case in plain])
    del stock
    ours = start_engine(checkpoint, dtype="bfloat16", **OPTIONS)
    assert greedy(ours, [replace(case, reductions=()) for case in plain]) == expected
    forget(ours)
    assert greedy(ours, plain) == expected


def test_the_page_says_which_methods_work(llm: Any) -> None:
    assert_documented("Qwen3.5", llm)
