"""Checkpoints of eight layers, their references with memory, and one engine at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.engine.withdrawal.harness import Case, Engine, answer_of
from tests.engine.withdrawal.reference import WithdrawingReference

LAYERS = 8

Check = Callable[[Engine, int, Sequence[Case], int], list[Any]]


@pytest.fixture(scope="session")
def eight_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA-1.5 checkpoint in fp32 with eight decoder layers and 144 vision tokens per image."""
    from foldserve.server.quality.demo_model import create

    return create(tmp_path_factory.mktemp("checkpoints") / "eight-layers", image_size=168, num_layers=LAYERS)


@pytest.fixture(scope="session")
def check(eight_layers: Path) -> Check:
    """Generates all cases in one call and asserts that tokens and log-probabilities equal the reference's."""
    known: dict[tuple[int, Case, int], tuple[list[int], list[float]]] = {}
    references: dict[int, WithdrawingReference] = {}

    def check(engine: Engine, layer: int, cases: Sequence[Case], tokens: int) -> list[Any]:
        outputs = engine.generate(cases, tokens)
        reference = references.setdefault(layer, WithdrawingReference(eight_layers, layer))
        for case, output in zip(cases, outputs, strict=True):
            key = layer, case, tokens
            if key not in known:
                known[key] = reference.generate(case.prompt, case.images, case.reductions, tokens)
            ids, logprobs = answer_of(output)
            assert ids == known[key][0], case
            assert logprobs == pytest.approx(known[key][1], abs=2e-4), case
        return outputs

    return check


@pytest.fixture(scope="package")
def small_chunks(eight_layers: Path) -> Iterator[Engine]:
    """K = N/2; chunks of 50 tokens cut every image; prefix caching is on."""
    engine = Engine(eight_layers, LAYERS // 2, max_num_batched_tokens=50)
    yield engine
    engine.assert_all_blocks_free()
