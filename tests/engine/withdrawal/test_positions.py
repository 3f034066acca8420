"""Kept positions in an engine with a layer K, of images that are withdrawn and others, against plain PyTorch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.engine.conftest import LAYERS
from tests.engine.keeping_reference import KeepingWithdrawingReference
from tests.engine.withdrawal.conftest import Expected
from tests.engine.withdrawal.harness import AskedCase, Case, Engine, words

K = LAYERS // 2
TOKENS = 10


class KeepingExpected(Expected):
    """`Expected` from a reference that keeps positions too."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._references[K] = KeepingWithdrawingReference(path, K)


@pytest.fixture(scope="module")
def expected(eight_layers: Path) -> KeepingExpected:
    return KeepingExpected(eight_layers)


def asked(prompt: str, photos: tuple[int, ...], *reductions: dict[str, object]) -> AskedCase:
    """Each image with a reduction of its own; positions are kept unless it says otherwise."""
    return AskedCase(prompt, photos, asked=tuple(json.dumps({"positions": "keep"} | each) for each in reductions))


QUESTION = f"USER: <image> {words(1, 5)} ASSISTANT:"
TWO = f"USER: {words(2, 20)} <image> {words(4, 9)} <image> {words(5, 33)} ASSISTANT:"
HALF: dict[str, object] = {"ratio": 0.5}
WITHDRAWN = HALF | {"withdraw": True}

CASES = [
    asked(QUESTION, (0,), WITHDRAWN),
    asked(QUESTION, (0,), HALF),
    asked(QUESTION, (0,), WITHDRAWN | {"positions": "renumber"}),
    asked(QUESTION, (0,), {"ratio": 0.25, "method": "folder_cls", "withdraw": True}),
    asked(TWO, (1, 2), WITHDRAWN, HALF),
    asked(TWO, (1, 2), WITHDRAWN, WITHDRAWN | {"positions": "renumber"}),
    asked(TWO, (2, 1), HALF | {"positions": "renumber"}, WITHDRAWN),
    asked(TWO, (2, 1), {"withdraw": True}, HALF),
    asked(f"{words(9, 31)} <image>", (2,), WITHDRAWN),
    Case(QUESTION, (0,)),
    Case(f"USER: {words(6, 50)} ASSISTANT:"),
]
"""Kept and withdrawn, one of the two, neither; one image or two, one at the end of the prompt."""

CHOSEN = [
    asked(QUESTION, (0,), {"method": "folder+fastv", **HALF, "decoder_ratio": 0.5}),
    asked(QUESTION, (0,), {"method": "folder+illava_decoder", **HALF, "decoder_ratio": 0.5}),
    asked(TWO, (1, 2), {"method": "folder+fastv", **HALF, "decoder_ratio": 0.3}, WITHDRAWN),
]
"""Tokens of the image are chosen at K among those that are left, by attention that depends on their positions."""


def test_chunks_that_cut_images_and_again_from_the_cache(small_chunks: Engine, expected: KeepingExpected) -> None:
    """The second time whole images come from the prefix cache, and the encoder is not asked."""
    expected.generate(small_chunks, K, CASES, TOKENS)
    small_chunks.llm.llm_engine.reset_encoder_cache()
    outputs = expected.generate(small_chunks, K, CASES, TOKENS)
    behind = [CASES[i].prompt == TWO and output.num_cached_tokens > 20 + 72 + 9 for i, output in enumerate(outputs)]
    assert sum(behind) >= 4
    small_chunks.assert_all_blocks_free()


def test_chosen_tokens(small_pool: Engine, expected: KeepingExpected) -> None:
    expected.generate(small_pool, K, [*CHOSEN, *CASES[:3]], TOKENS)
    small_pool.assert_all_blocks_free()


def test_on_a_pool_that_preempts(small_pool: Engine, expected: KeepingExpected) -> None:
    before = small_pool.steps.copy()
    expected.generate(small_pool, K, [*CASES[:2], CASES[5], CHOSEN[0]] * 6, 30)
    seen = small_pool.steps - before
    assert seen["preempted"] and seen["whole_again"]
    small_pool.assert_all_blocks_free()


def test_positions_show_in_the_answer(expected: KeepingExpected) -> None:
    """Else the comparisons above would prove nothing."""
    answers = [expected.answer(K, case, TOKENS)[1] for case in [*CASES[:4], CASES[9], *CHOSEN[:2]]]
    assert len({tuple(answer) for answer in answers}) == len(answers)
    assert max(abs(a - b) for a, b in zip(answers[0], answers[2], strict=True)) > 1e-3
