"""Steps in parts, as piecewise CUDA graphs replay them, with model runner V2; `runners/test_v2.py` runs it.

V2 captures on CUDA only. So each part's graph of a size is captured in the first step that has it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foldserve.server.engine import withdrawal
from tests.engine.conftest import LAYERS
from tests.engine.cuda.graphs import Piecewise, Pool
from tests.engine.withdrawal.conftest import Expected
from tests.engine.withdrawal.harness import Engine
from tests.engine.withdrawal.test_kept import CASES as CHOSEN
from tests.engine.withdrawal.test_reference import MIXED

K = LAYERS // 2
SIZES = [4, 64, 200, 400]
TOKENS = 5


def test_replayed_parts_equal_the_reference(eight_layers: Path, expected: Expected) -> None:
    from vllm.config import CUDAGraphMode
    from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

    def dispatch(num_reqs: int, num_tokens: int, *args: Any, **kwargs: Any) -> BatchExecutionDescriptor:
        padded = next(size for size in SIZES if size >= num_tokens)
        return BatchExecutionDescriptor(CUDAGraphMode.PIECEWISE, padded, None)

    options = withdrawal.configure(K, device="cpu") | {"max_num_batched_tokens": SIZES[-1]}
    engine = Engine(eight_layers, None, **options)
    runner = engine.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    assert type(runner.model_state).__name__ == "WithdrawingModelState"
    runner.compilation_config.max_cudagraph_capture_size = SIZES[-1]
    decoder, pool = runner.model.language_model.model, Pool()
    pool.capturing = False
    for name in ("shallow", "after_attention", "deep"):
        part = Piecewise(getattr(decoder, name), pool)
        delattr(decoder, name)
        setattr(decoder, name, part)
    runner.cudagraph_manager.dispatch = dispatch
    for cases in ([MIXED[0], MIXED[3], CHOSEN[3]], [CHOSEN[4], MIXED[5]], [MIXED[3], MIXED[6]]):
        expected.generate(engine, K, cases, TOKENS)
    engine.assert_all_blocks_free()
    assert decoder.shallow.replays.total() > decoder.deep.replays.total() > 0 < decoder.deep.eager
