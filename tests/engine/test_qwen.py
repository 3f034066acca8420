"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images of any size under M-RoPE, against vLLM's own and plain transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm import ModelRegistry
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageProcessorItems

from foldserve.reducers.plan import InvalidReduction
from foldserve.server.engine import withdrawal
from foldserve.server.engine.families.registry import ENTRIES, family_of
from tests import qwen_checkpoint
from tests.engine.conftest import MAX_TOKENS, Case, greedy, start_engine
from tests.engine.qwen_reference import QwenReference
from tests.images import photo
from tests.qwen_checkpoint import IMAGE, MODELS

SIZES = ((280, 196), (168, 336), (256, 256))
"""(width, height)"""

K = 4  # of 8 layers; Qwen3-VL's first three add deepstack levels
KEEP, RENUMBER = {"positions": "keep"}, {"positions": "renumber"}

CUT: dict[str, Any] = {
    "max_model_len": 512,
    "max_num_batched_tokens": 300,
    "long_prefill_token_threshold": 40,
    "num_gpu_blocks_override": 24,
}
"""Chunks cut every image, and the pool has room for a few of the prompts."""


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_checkpoint.write(tmp_path_factory.mktemp("checkpoints") / request.param, request.param)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> QwenReference:
    return QwenReference(checkpoint, K)


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Any:
    """With a withdrawal layer; prefix caching is on, as by default."""
    options = {"max_model_len": 2048, "max_num_batched_tokens": 300, "max_num_seqs": 8}
    return start_engine(checkpoint, **options, **withdrawal.configure(K, device="cpu"))


def ask(*parts: str) -> str:
    return f"<|im_start|>user\n{''.join(parts)}<|im_end|>\n<|im_start|>assistant\n"


def one_image(width: int, height: int, **reduction: object) -> Case:
    return Case(ask(IMAGE, "what is it?"), [photo(width * height, width, height)], [reduction])


def two_images(first: dict[str, Any], second: dict[str, Any]) -> Case:
    images = [photo(1, *SIZES[0]), photo(2, *SIZES[1])]
    return Case(ask("first ", IMAGE, "then", IMAGE, "?"), images, [first, second])


BEFORE_THE_DECODER = [
    *(one_image(*size) for size in SIZES),
    *(one_image(*size, ratio=ratio) for size in SIZES[:2] for ratio in (0.5, 0.75)),
    *(one_image(*size, ratio=ratio, positions="renumber") for size in SIZES[:2] for ratio in (0.5, 0.75)),
    two_images({"ratio": 0.5, **KEEP}, {"ratio": 0.75, **RENUMBER}),
    two_images({}, {"ratio": 0.75}),
    one_image(*SIZES[0], method="random", ratio=0.6),
    one_image(*SIZES[1], method="random", ratio=0.6, positions="renumber"),
    one_image(*SIZES[2], method="pool", ratio=0.7),
    one_image(*SIZES[0], method="pool", ratio=0.7, positions="keep"),
    one_image(*SIZES[0], keep_tokens=10),
    one_image(*SIZES[1], keep_tokens=1000),  # more than it has: all stay
    Case(ask("hello there")),
]
IN_THE_DECODER = [
    one_image(*SIZES[0], withdraw=True),
    one_image(*SIZES[1], ratio=0.5, withdraw=True),
    one_image(*SIZES[1], ratio=0.5, withdraw=True, positions="renumber"),
    two_images({"ratio": 0.75}, {"withdraw": True}),
    two_images({"ratio": 0.5, "withdraw": True}, {}),
    one_image(*SIZES[0], method="fastv", ratio=0.5),
    one_image(*SIZES[1], method="folder+fastv", ratio=0.5, decoder_ratio=0.5),
    one_image(*SIZES[0], method="folder+fastv", ratio=0.5, decoder_ratio=0.5, positions="renumber"),
    one_image(*SIZES[1], method="illava_decoder", ratio=0.5),
]


def assert_same(llm: Any, reference: QwenReference, cases: Sequence[Case]) -> None:
    for case, (tokens, logprobs) in zip(cases, greedy(llm, cases), strict=True):
        want, expected = reference.generate(case.prompt, case.images, case.reductions, MAX_TOKENS)
        assert tokens == want, ([image.size for image in case.images], case.reductions)
        assert logprobs == pytest.approx(expected, abs=2e-5)


def test_all_in_one_batch_and_again_from_the_cache(llm: Any, reference: QwenReference) -> None:
    for _ in range(2):
        assert_same(llm, reference, BEFORE_THE_DECODER + IN_THE_DECODER)


def downsampled(width: int, height: int, ratio: float, grid: tuple[int, int], **where: str) -> Case:
    """`grid` is what the plan has to choose, of 7 x 10 tokens or of 12 x 6 (Qwen3's: 6 x 9, 10 x 5)."""
    return one_image(width, height, method="downsample", ratio=ratio, expected_grid=grid, **where)


def test_ratio_0_is_vllms_own_bit_for_bit(checkpoint: Path, reference: QwenReference) -> None:
    """And on the same engine reduced images in chunks, some of them preempted."""
    (architecture,) = reference.config.architectures
    module = ENTRIES[architecture].model.partition(".")[0]
    stock_class = f"Stock{architecture}"
    ModelRegistry.register_model(stock_class, f"vllm.model_executor.models.{module}:{architecture}")
    plain = [one_image(*size) for size in SIZES] + [two_images({}, {})]
    stock = start_engine(checkpoint, hf_overrides={"architectures": [stock_class]}, worker_cls="auto", **CUT)
    expected = greedy(stock, [replace(case, reductions=()) for case in plain])
    del stock
    ours = start_engine(checkpoint, **CUT)
    assert greedy(ours, [replace(case, reductions=()) for case in plain]) == expected
    assert greedy(ours, plain) == expected
    assert_same(ours, reference, BEFORE_THE_DECODER)
