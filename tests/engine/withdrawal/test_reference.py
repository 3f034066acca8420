"""Tokens and log-probabilities of the engine equal plain PyTorch, whatever shares a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import LAYERS
from tests.engine.withdrawal.conftest import Expected
from tests.engine.withdrawal.harness import Case, Engine, words

TOKENS = 10

MIXED = [
    Case(f"USER: <image> {words(1, 5)} ASSISTANT:", (0,)),
    Case(f"USER: {words(2, 40)} <image> {words(3, 70)} ASSISTANT:", (1,)),
    Case(f"USER: <image> {words(4, 9)} <image> {words(5, 33)} ASSISTANT:", (0, 2)),
    Case(f"USER: {words(6, 50)} ASSISTANT:"),
    Case("USER: <image> <image> <image> ASSISTANT:", (3, 4, 5)),
    Case(f"USER: <image> {words(1, 5)} ASSISTANT:", (0,), withdraw=False),
    Case(f"USER: <image> {words(4, 9)} <image> {words(5, 33)} ASSISTANT:", (0, 2), withdraw=(False, True)),
    Case("<image> who", (1,)),
    Case(f"USER: {words(9, 31)} <image>", (2,)),
    Case("<image>", (4,)),
    Case("<image><image>", (5, 3)),
]
"""One to three images, text before, behind or none, with and without withdrawal, one image of two, one at the end."""


def test_chunks_of_50_tokens_with_steps_of_no_deep_row(small_chunks: Engine, expected: Expected) -> None:
    assert small_chunks.llm.reset_prefix_cache()  # that step needs a first image that no earlier test left
    before = small_chunks.steps["no_deep_row"]
    expected.generate(small_chunks, LAYERS // 2, MIXED, TOKENS)
    expected.generate(small_chunks, LAYERS // 2, MIXED[::-1], TOKENS)  # now from the prefix cache
    assert small_chunks.steps["no_deep_row"] > before


def test_steps_of_one_token_per_request(
    small_chunks: Engine, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill one token at a time: vision tokens in the place where decode steps have text."""
    monkeypatch.setattr(small_chunks.scheduler.scheduler_config, "long_prefill_token_threshold", 1)
    expected.generate(
        small_chunks, LAYERS // 2, [Case(f"<image> {words(11, 4)}", (1,)), Case(f"{words(12, 3)} <image>", (2,))], 4
    )


VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "first layer only": (1, {"enable_prefix_caching": False, "max_num_batched_tokens": 4096}),
    "k 2, asynchronous scheduler": (
        2,
        {"scheduler_cls": "foldserve.server.engine.withdrawal.scheduler.WithdrawingAsyncScheduler"},
    ),
    "k 3, buckets, chunks of 70": (3, {"max_num_batched_tokens": 70}),
    "last layer only, chunks of 150": (LAYERS - 1, {"max_num_batched_tokens": 150}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_layers_and_groupings(eight_layers: Path, expected: Expected, variant: str) -> None:
    layer, options = VARIANTS[variant]
    engine = Engine(eight_layers, layer, **options)
    for _ in range(2):  # the second time from the prefix cache, if there is one
        expected.generate(engine, layer, MIXED, TOKENS)
    engine.assert_all_blocks_free()


def test_thirty_requests_on_a_pool_that_preempts(small_pool: Engine, expected: Expected) -> None:
    before = small_pool.steps["preempted"]
    expected.generate(small_pool, LAYERS // 2, MIXED[:10] * 3, 40)
    assert small_pool.steps["preempted"] > before


def test_withdrawal_shows_in_the_answer(expected: Expected) -> None:
    """Else the comparisons above would prove nothing."""
    with_image, without = expected.answer(LAYERS // 2, MIXED[0], TOKENS), expected.answer(LAYERS // 2, MIXED[5], TOKENS)
    assert MIXED[0].prompt == MIXED[5].prompt and with_image[0] != without[0]


def test_several_sequences_of_one_prompt(small_chunks: Engine, expected: Expected) -> None:
    case = Case(f"{words(21, 12)} <image> {words(22, 12)}", (1,))
    (output,) = small_chunks.generate([case], TOKENS, n=3, temperature=1.0, top_k=1)  # sampling of one candidate
    tokens = expected.answer(LAYERS // 2, case, TOKENS)[0]
    assert [list(sequence.token_ids) for sequence in output.outputs] == [tokens] * 3


def test_generation_up_to_the_context_limit(small_chunks: Engine, expected: Expected) -> None:
    case = Case(f"<image> {words(23, 5)} <image> <image> <image> {words(24, 40)}", (0, 1, 2, 3))
    (output,) = small_chunks.generate([case], 768)
    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 768
    expected.check(LAYERS // 2, case, output)
