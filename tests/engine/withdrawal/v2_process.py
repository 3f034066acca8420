"""An engine that needs a process of its own, since vLLM reads some settings once: `python -m ... CHECKPOINT`."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest


def runner_v2(path: Path) -> None:
    """Model runner V2 on the CPU, vLLM's Triton kernels interpreted, on a pool that preempts.

    Triton brings no CPU backend: the name of one is enough for vLLM, and TRITON_INTERPRET=1 never asks for it.
    """
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
    from foldserve.server.engine import withdrawal
    from tests.engine.withdrawal.conftest import LAYERS, Expected
    from tests.engine.withdrawal.harness import AskedCase, Engine
    from tests.engine.withdrawal.test_kept import TINY
    from tests.engine.withdrawal.test_reference import MIXED

    layer = LAYERS // 2
    pool = {"max_model_len": 512, "num_gpu_blocks_override": 36, "max_num_batched_tokens": 70, "max_num_seqs": 32}
    engine = Engine(path, None, **withdrawal.configure(layer, device="cpu", v2_runner=True), **pool)
    worker = engine.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    assert type(worker.model_runner.model_state).__name__ == "WithdrawingModelState"
    expected = Expected(path)
    for _ in range(2):
        expected.generate(engine, layer, [*MIXED, TINY], 8)
    engine.assert_all_blocks_free()
    assert engine.steps["preempted"] and engine.steps["no_deep_row"]
    keeping = AskedCase("USER: <image> who", (0,), asked='{"ratio": 0.5, "positions": "keep"}')
    with pytest.raises(ValueError, match="can't keep positions: it needs foldserve's worker on model runner V1"):
        engine.generate([keeping], 1)  # the last thing: vLLM gives up an engine whose step failed


if __name__ == "__main__":
    runner_v2(Path(sys.argv[1]))
    print("equal to the reference")
