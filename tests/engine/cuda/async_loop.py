"""vLLM's asynchronous loop: a step is scheduled before the last one's tokens are known, which never leave the device.

Every server with CUDA has it, and the CPU platform switches it off. With tensors on the CPU it only needs streams and
events that do nothing, so no copy overlaps with anything here.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import V2
from tests.engine.withdrawal.harness import Case, Engine
from tests.engine.withdrawal.test_kept import CASES as CHOSEN
from tests.engine.withdrawal.test_positions import CASES as KEPT
from tests.engine.withdrawal.test_positions import CHOSEN as CHOSEN_KEPT
from tests.engine.withdrawal.test_positions import K, KeepingExpected
from tests.engine.withdrawal.test_reference import MIXED

ASYNCHRONOUS = "foldserve.server.engine.withdrawal.scheduler.WithdrawingAsyncScheduler"


class Nothing:
    """An event, or a stream."""

    device = torch.device("cpu")

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    wait = synchronize = wait_event = wait_stream = record


@pytest.fixture(scope="module", autouse=True)
def asynchronous() -> None:
    """Lets the CPU platform of this process keep the loop that was asked for."""
    from vllm.platforms.cpu import CpuPlatform

    cuda: Any = torch.cuda
    cuda.Event = cuda.Stream = Nothing
    cuda.current_stream = Nothing
    cuda.stream = lambda stream: nullcontext(stream)
    check: Any = CpuPlatform.check_and_update_config

    def keep_loop(cls: type[CpuPlatform], config: Any) -> None:
        wanted = config.scheduler_config.async_scheduling
        check(config)
        config.scheduler_config.async_scheduling = wanted

    platform: Any = CpuPlatform
    platform.check_and_update_config = classmethod(keep_loop)


class AsyncEngine(Engine):
    """Modification: counts in `steps` those that went on with a request whose last tokens were not known, "ahead"."""

    def __init__(self, path: Path, **options: Any) -> None:
        super().__init__(path, K, scheduler_cls=ASYNCHRONOUS, async_scheduling=True, **options)
        assert self.llm.llm_engine.vllm_config.use_v2_model_runner == V2
        core = self.llm.llm_engine.engine_core.engine_core
        assert core.batch_queue_size == 2 and core.step_fn == core.step_with_batch_queue
        update = self.scheduler.update_from_output

        def counted(step: Any, *args: Any) -> Any:
            scheduled = [later.num_scheduled_tokens.keys() for _, later, _ in core.batch_queue]
            self.steps["ahead"] += any(step.num_scheduled_tokens.keys() & requests for requests in scheduled)
            return update(step, *args)

        self.scheduler.update_from_output = counted

    def check(self, expected: KeepingExpected, cases: Sequence[Case], tokens: int) -> None:
        before = self.steps.copy()
        expected.generate(self, K, cases, tokens)
        seen = self.steps - before
        assert seen["ahead"] > seen["all"] // 2
        self.assert_all_blocks_free()


def test_chunks_that_cut_images(eight_layers: Path, expected: KeepingExpected) -> None:
    """The second time from the prefix cache."""
    engine = AsyncEngine(eight_layers, max_num_batched_tokens=70)
    cases = [MIXED[0], MIXED[2], MIXED[6], KEPT[4], KEPT[8], MIXED[3]]
    engine.check(expected, cases, 5)
    engine.check(expected, cases[::-1], 5)
    assert engine.steps["no_deep_row"]


def test_a_pool_that_preempts(eight_layers: Path, expected: KeepingExpected) -> None:
    """Withdrawn, chosen and kept in one batch; a prompt with chosen tokens is computed whole again."""
    options = {"max_model_len": 512, "num_gpu_blocks_override": 40, "max_num_batched_tokens": 700}
    engine = AsyncEngine(eight_layers, **options)
    engine.check(expected, [MIXED[3], KEPT[5], CHOSEN[3], CHOSEN_KEPT[0], CHOSEN[4]] * 3, 20)
    assert engine.steps["preempted"] and engine.steps["whole_again"]
