"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images of any size under M-RoPE, against vLLM's own and plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import qwen_checkpoint
from tests.engine.conftest import MAX_TOKENS, Case, greedy, start_engine
from tests.engine.qwen_reference import QwenReference
from tests.images import photo
from tests.qwen_checkpoint import IMAGE, MODELS

SIZES = ((280, 196), (168, 336), (256, 256))
"""(width, height); the last has 8 x 8 tokens of Qwen3's, 9 x 9 of the others'."""

KEEP, RENUMBER = {"positions": "keep"}, {"positions": "renumber"}


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_checkpoint.write(tmp_path_factory.mktemp("checkpoints") / request.param, request.param)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> QwenReference:
    return QwenReference(checkpoint)


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Any:
    """Chunks cut every image; prefix caching is on, as by default."""
    return start_engine(checkpoint, max_model_len=2048, max_num_batched_tokens=300, long_prefill_token_threshold=40)


def ask(*parts: str) -> str:
    return f"<|im_start|>user\n{''.join(parts)}<|im_end|>\n<|im_start|>assistant\n"


def one_image(width: int, height: int, **reduction: object) -> Case:
    return Case(ask(IMAGE, "what is it?"), [photo(width * height, width, height)], [reduction])


def two_images(first: dict[str, Any], second: dict[str, Any]) -> Case:
    images = [photo(1, *SIZES[0]), photo(2, *SIZES[1])]
    return Case(ask("first ", IMAGE, "then", IMAGE, "?"), images, [first, second])


CASES = [
    *(one_image(*size) for size in SIZES),
    *(
        one_image(*size, ratio=ratio, **where)
        for size in SIZES[:2]
        for ratio in (0.5, 0.75)
        for where in ({}, RENUMBER)
    ),
    two_images({"ratio": 0.5} | KEEP, {"ratio": 0.75} | RENUMBER),
    two_images({}, {"ratio": 0.75}),
    one_image(*SIZES[0], method="random", ratio=0.6),
    one_image(*SIZES[1], method="random", ratio=0.6, **RENUMBER),
    one_image(*SIZES[2], method="pool", ratio=0.7),
    one_image(*SIZES[0], method="pool", ratio=0.7, **KEEP),
    one_image(*SIZES[0], keep_tokens=10),
    one_image(*SIZES[1], keep_tokens=1000),
    Case(ask("hello there")),
]


def assert_same(llm: Any, reference: QwenReference, cases: list[Case]) -> None:
    for case, (tokens, logprobs) in zip(cases, greedy(llm, cases), strict=True):
        want, expected = reference.generate(case.prompt, case.images, case.reductions, MAX_TOKENS)
        assert tokens == want, ([image.size for image in case.images], case.reductions)
        assert logprobs == pytest.approx(expected, abs=2e-5)


def test_all_in_one_batch_and_again_from_the_cache(llm: Any, reference: QwenReference) -> None:
    for _ in range(2):
        assert_same(llm, reference, CASES)
