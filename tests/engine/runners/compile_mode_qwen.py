"""Qwen3-VL in vLLM's compile mode and with piecewise graphs, as `compile_mode.py`.

Positions of three dimensions and deepstack levels have to be where the graphs read them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foldserve.server.engine import withdrawal
from tests.engine.conftest import Case, start_engine
from tests.engine.qwen_reference import Answer
from tests.engine.runners.compile_mode import PIECES, STEP, as_on_cuda, capture
from tests.engine.test_qwen import (  # fixtures among them
    BEFORE_THE_DECODER,
    IN_THE_DECODER,
    K,
    assert_same,
    checkpoint,
    expect,
    reference,
)

__all__ = ["as_on_cuda", "checkpoint", "expect", "reference"]

CASES = [BEFORE_THE_DECODER[i] for i in (0, 3, 8, 10)]
"""Whole and reduced; positions kept and not; two images, which the steps cut."""


@pytest.mark.parametrize("checkpoint", ["qwen3_vl"], indirect=True)
@pytest.mark.parametrize("layer", [None, K])
def test_compiled_and_captured(layer: int | None, checkpoint: Path, expect: Callable[[Case], Answer]) -> None:
    from vllm.config import CompilationMode

    options: dict[str, Any] = {} if layer is None else withdrawal.configure(layer, device="cpu")
    cases = CASES if layer is None else CASES[1:3] + IN_THE_DECODER[1:7:4]
    PIECES.clear()
    llm = start_engine(checkpoint, enforce_eager=False, max_num_batched_tokens=STEP, max_model_len=512, **options)
    assert llm.llm_engine.vllm_config.compilation_config.mode == CompilationMode.VLLM_COMPILE
    assert_same(llm, expect, cases)
    capture(llm)
    for batch in (cases, cases[::-1]):
        assert_same(llm, expect, batch)
    replays = [piece.replays.total() for piece in PIECES]
    assert min(replays) > 0 and (max(replays) > min(replays)) == (layer is not None)  # fewer where rows leave
