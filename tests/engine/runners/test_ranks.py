"""Two ranks of Qwen3-VL, whose tower is split over them, or whole on each of them."""

from __future__ import annotations

from pathlib import Path

from tests import qwen_checkpoint
from tests.engine.test_tensor_parallel import assert_equal


def test_two_ranks_of_qwen3_vl(tmp_path: Path) -> None:
    assert_equal("qwen", qwen_checkpoint.write(tmp_path / "qwen3_vl", "qwen3_vl"))
