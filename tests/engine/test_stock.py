"""At ratio 0 the drop-in class is vLLM's own LLaVA, bit for bit, eager and compiled."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.conftest import Case, greedy, start_engine
from tests.images import photo

STOCK = "StockLlavaForConditionalGeneration"
CASES = [
    Case("USER: <image>\nWhat is in the picture? ASSISTANT:", [photo(1)], [{}]),
    Case("USER: <image> <image>\nDiffer how? ASSISTANT:", [photo(2), photo(3)], [{}, {"ratio": 0}]),
    Case("USER: no picture at all ASSISTANT:"),
]


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "inductor"])
def test_ratio_zero_is_stock_bit_for_bit(tiny_llava: Path, eager: bool) -> None:
    from vllm import ModelRegistry

    ModelRegistry.register_model(STOCK, "vllm.model_executor.models.llava:LlavaForConditionalGeneration")
    options = {"enforce_eager": eager, "enable_prefix_caching": False}
    stock_engine = start_engine(tiny_llava, hf_overrides={"architectures": [STOCK]}, **options)
    plain = [Case(case.prompt, case.images, ()) for case in CASES]
    stock = greedy(stock_engine, plain)
    del stock_engine
    ours_engine = start_engine(tiny_llava, **options)
    assert greedy(ours_engine, plain) == stock
    assert greedy(ours_engine, CASES) == stock
    reduced = Case(CASES[0].prompt, CASES[0].images, [{"ratio": 0.5}])
    mixed = greedy(ours_engine, [reduced, *CASES])
    assert [tokens for tokens, _ in mixed[1:]] == [tokens for tokens, _ in stock]
    assert mixed[0] != stock[0]
