"""Qwen3-VL with a mixture of experts; `test_qwen.py` runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.engine.conftest import Case
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

__all__ = ["checkpoint", "expect", "llm", "reference"]


@pytest.mark.parametrize("checkpoint", ["qwen3_vl_moe"], indirect=True)
def test_a_mixture_of_experts(llm: Any, expect: Callable[[Case], Answer]) -> None:
    """Its decoder alone is another one than Qwen3-VL's."""
    assert_same(llm, expect, BEFORE_THE_DECODER[:5] + IN_THE_DECODER)
