"""The compile mode that vLLM has on CUDA: its own backend cuts each part at its attention, and keeps what it compiled.

The CPU platform would trace each part once instead. Run twice with one cache folder (`VLLM_CACHE_ROOT`): an engine that
compiles, and one that loads what the first has saved.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.engine.cuda.graphs import Piecewise, Pool
from tests.engine.withdrawal.conftest import Expected
from tests.engine.withdrawal.harness import Case, Engine
from tests.engine.withdrawal.test_kept import CASES as CHOSEN
from tests.engine.withdrawal.test_reference import MIXED

K, LAYERS = 1, 2
STEP, SIZES = 135, [1, 2, 4, 8, 64, 135]
POOL = Pool()
PIECES: list[Piecewise] = []
CASES: list[Case] = [MIXED[0], MIXED[6], CHOSEN[1]]
"""Steps with all rows and with fewer; those whose tokens are chosen and those without."""


@pytest.fixture(scope="module", autouse=True)
def as_on_cuda() -> None:
    """Lets the CPU platform of this process keep vLLM's compile mode."""
    from vllm.compilation import backends
    from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    check: Any = CpuPlatform.check_and_update_config

    def keep_mode(cls: type[CpuPlatform], config: Any) -> None:
        compilation = config.compilation_config
        wanted = compilation.mode
        check(config)
        if wanted == CompilationMode.VLLM_COMPILE:
            compilation.mode, compilation.backend, compilation.compile_sizes = wanted, "inductor", []

    platform: Any = CpuPlatform
    platform.check_and_update_config = classmethod(keep_mode)
    functionalization: Any = FixFunctionalizationPass
    functionalization.__call__ = lambda self, graph: None  # it names operators that only CUDA builds have

    def wrap(piece: Any, config: Any, options: Any, is_first_graph: bool, is_last_graph: bool) -> Piecewise:
        PIECES.append(Piecewise(piece, POOL, is_last=is_last_graph))
        return PIECES[-1]

    backends.wrap_with_cudagraph_if_needed = wrap


def test_three_parts_compiled_saved_and_loaded() -> None:
    import torch._dynamo.utils
    from vllm.compilation.counter import compilation_counter as counter
    from vllm.config import CompilationMode

    from foldserve.server.quality.demo_model import create

    cache = Path(os.environ["VLLM_CACHE_ROOT"])
    path = cache.with_name("checkpoint")  # of which the name is part of the key
    warm = path.exists()
    if not warm:
        create(path, image_size=168, num_layers=LAYERS)
    engine = Engine(path, K, enforce_eager=False, max_num_batched_tokens=STEP)
    assert engine.llm.llm_engine.vllm_config.compilation_config.mode == CompilationMode.VLLM_COMPILE
    counts = (counter.num_aot_compiles, counter.num_aot_artifacts_saved, counter.num_aot_artifacts_loaded)
    expected = Expected(path)
    expected.generate(engine, K, CASES, 3)
    engine.assert_all_blocks_free()
    assert counts == ((0, 0, 3) if warm else (3, 3, 0))
    assert not torch._dynamo.utils.counters["graph_break"]
    capture(engine.llm)
    for cases in (CASES, [MIXED[5]], [MIXED[3], MIXED[0]], CASES[::-1]):
        expected.generate(engine, K, cases, 5)
    counts_of_pieces = [piece.replays.total() for piece in PIECES]
    assert max(counts_of_pieces) > min(counts_of_pieces) > 0  # shallow pieces also where rows leave, deep ones not


def capture(llm: Any) -> None:
    """Piecewise graphs of all steps, as on a GPU, whose pieces vLLM has cut and wrapped."""
    from vllm.config import CUDAGraphMode

    POOL.capturing = True
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    compilation = runner.vllm_config.compilation_config
    compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
    compilation.cudagraph_capture_sizes, compilation.max_cudagraph_capture_size = SIZES, SIZES[-1]
    runner.cudagraph_dispatcher.initialize_cudagraph_keys(CUDAGraphMode.PIECEWISE, 1)
    for size in reversed(SIZES):
        runner._dummy_run(size, CUDAGraphMode.PIECEWISE, is_graph_capturing=True)
    POOL.capturing = False
