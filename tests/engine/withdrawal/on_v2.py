"""Withdrawal with model runner V2 on a pool that preempts; `tests/engine/test_v2.py` runs it."""

from __future__ import annotations

from pathlib import Path

from foldserve.server.engine import withdrawal
from tests.engine.conftest import LAYERS
from tests.engine.withdrawal.conftest import Expected
from tests.engine.withdrawal.harness import Engine
from tests.engine.withdrawal.test_kept import TINY
from tests.engine.withdrawal.test_reference import MIXED

K = LAYERS // 2


def test_a_pool_that_preempts(eight_layers: Path, expected: Expected) -> None:
    """The second time from the caches."""
    pool = {"max_model_len": 512, "num_gpu_blocks_override": 36, "max_num_batched_tokens": 70, "max_num_seqs": 32}
    engine = Engine(eight_layers, None, **withdrawal.configure(K, device="cpu"), **pool)
    worker = engine.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    assert type(worker.model_runner.model_state).__name__ == "WithdrawingModelState"
    for _ in range(2):
        expected.generate(engine, K, [*MIXED, TINY], 8)
    engine.assert_all_blocks_free()
    assert engine.steps["preempted"] and engine.steps["no_deep_row"]
