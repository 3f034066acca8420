"""Checkpoints of eight layers, their references with memory, and one engine at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import LAYERS
from tests.engine.withdrawal.harness import Case, Engine, answer_of
from tests.engine.withdrawal.reference import WithdrawingReference


class Expected:
    """The reference's answers, remembered: the same case serves several tests."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._references: dict[int, WithdrawingReference] = {}
        self._known: dict[tuple[int, Case, int], tuple[list[int], list[float]]] = {}

    def answer(self, layer: int, case: Case, tokens: int) -> tuple[list[int], list[float]]:
        key = layer, case, tokens
        if key not in self._known:
            if layer not in self._references:
                self._references[layer] = WithdrawingReference(self._path, layer)
            reference = self._references[layer]
            self._known[key] = reference.generate(case.prompt, case.images, case.reductions, tokens, case.tail)
        return self._known[key]

    def check(self, layer: int, case: Case, output: Any) -> None:
        """Asserts that an output of vLLM has these tokens and log-probabilities."""
        ids, logprobs = answer_of(output)
        expected_ids, expected_logprobs = self.answer(layer, case, len(ids))
        assert ids == expected_ids, case
        assert logprobs == pytest.approx(expected_logprobs, abs=2e-4), case

    def generate(self, engine: Engine, layer: int, cases: Sequence[Case], tokens: int, **params: Any) -> list[Any]:
        """vLLM's outputs of all cases in one call, checked."""
        outputs = engine.generate(cases, tokens, **params)
        for case, output in zip(cases, outputs, strict=True):
            assert len(output.outputs[0].token_ids) == tokens
            self.check(layer, case, output)
        return outputs


@pytest.fixture(scope="session")
def expected(eight_layers: Path) -> Expected:
    return Expected(eight_layers)


@pytest.fixture(scope="package")
def small_chunks(eight_layers: Path) -> Iterator[Engine]:
    """K = N/2; chunks of 50 tokens cut every image; prefix caching is on."""
    engine = Engine(eight_layers, LAYERS // 2, max_num_batched_tokens=50)
    yield engine
    engine.assert_all_blocks_free()


@pytest.fixture(scope="package")
def small_pool(eight_layers: Path) -> Iterator[Engine]:
    """K = N/2; so few blocks that a dozen requests preempt each other and cached blocks are evicted all the time."""
    options = {"max_model_len": 512, "num_gpu_blocks_override": 40, "max_num_batched_tokens": 700, "max_num_seqs": 32}
    engine = Engine(eight_layers, LAYERS // 2, **options)
    yield engine
    engine.assert_all_blocks_free()
