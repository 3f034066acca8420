"""Qwen3-VL, Qwen3.5 and InternVL with a mixture of experts; `test_qwen.py` runs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engine import gated_delta
from tests.engine import test_internvl as internvl
from tests.engine.conftest import Case, start_engine
from tests.engine.qwen_reference import Answer
from tests.engine.test_qwen import (  # fixtures among them
    BEFORE_THE_DECODER,
    IN_THE_DECODER,
    assert_same,
    checkpoint,
    expect,
    llm,
    reference,
)
from tests.engine.test_qwen3_5 import IN_THE_TOWER, OPTIONS, OTHERS

__all__ = ["checkpoint", "expect", "llm", "reference"]


@pytest.mark.parametrize("checkpoint", ["qwen3_vl_moe"], indirect=True)
def test_a_mixture_of_experts(llm: Any, expect: Callable[[Case], Answer]) -> None:
    """Its decoder alone is another one than Qwen3-VL's."""
    assert_same(llm, expect, BEFORE_THE_DECODER[:5] + IN_THE_DECODER)


@pytest.mark.parametrize("checkpoint", ["qwen3_5_moe"], indirect=True)
def test_recurrent_layers_and_a_mixture_of_experts(checkpoint: Path, expect: Callable[[Case], Answer]) -> None:
    gated_delta.install()
    assert_same(start_engine(checkpoint, **OPTIONS), expect, OTHERS[:7] + IN_THE_TOWER[:2])


def test_internvl_with_a_mixture_of_experts(tmp_path: Path) -> None:
    """As InternVL3.5-30B-A3B; here, since no engine without experts has been in this process."""
    served = internvl.serve(tmp_path, "chat", "qwen3_moe")
    internvl.assert_same(internvl.start(served), served, internvl.MIXED[5:9] + internvl.IN_THE_DECODER)
