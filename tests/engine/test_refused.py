"""What `vllm.LLM` refuses: options at start-up, and single requests, without ending the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from foldserve.reducers.plan import InvalidReduction
from tests.engine.conftest import Case, greedy, start_engine
from tests.images import photo


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"compilation_config": {"cudagraph_mm_encoder": True}}, "cudagraph_mm_encoder"),
        ({"enable_lora": True, "enable_tower_connector_lora": True}, "--enable-tower-connector-lora"),
    ],
    ids=["graphs of the tower", "adapters of the tower"],
)
def test_options(tiny_llava: Path, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"{named} .*does not go with foldserve"):
        start_engine(tiny_llava, **options)


def test_positions_beyond_the_models(tiny_llava: Path) -> None:
    """Fifteen images of ten tokens fit into the context, and their positions not into those of the model."""
    llm = start_engine(tiny_llava, max_model_len=512, limit_mm_per_prompt={"image": 40})
    trained = llm.model_config.hf_text_config.max_position_embeddings

    def prompt(images: int, positions: str) -> Case:
        reduction = {"keep_tokens": 10, "positions": positions}
        return Case("<image> " * images, [photo(i, 64, 64) for i in range(images)], [reduction] * images)

    fitting, beyond = prompt(3, "keep"), prompt(trained // 144 + 1, "keep")
    before = greedy(llm, [fitting])
    for _ in range(2):
        with pytest.raises(InvalidReduction, match=f"of the model's {trained} positions"):
            greedy(llm, [beyond])
    assert greedy(llm, [prompt(trained // 144 + 1, "renumber")])
    assert greedy(llm, [fitting]) == before
