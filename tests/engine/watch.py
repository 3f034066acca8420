"""What an in-process engine does meanwhile: steps of the scheduler, rotary positions of each request."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


class Watched:
    """Of the steps under `watch`.

    Attributes:
        encoded: images that went through the encoder.
        preempted: requests that were put back to wait.
        chunks: request -> [(first token, rotary positions of the chunk), ...]
    """

    def __init__(self) -> None:
        self.encoded = 0
        self.preempted: list[str] = []
        self.chunks: dict[str, list[tuple[int, list[int]]]] = defaultdict(list)

    def positions(self) -> list[list[int]]:
        """Of the requests, in the order in which they began, those that were never preempted and read no cache."""
        return [[place for _, chunk in chunks for place in chunk] for chunks in self.chunks.values()]


@contextmanager
def watch(llm: Any) -> Iterator[Watched]:
    """Listens to the engine of `llm` until the block ends."""
    core = llm.llm_engine.engine_core.engine_core
    scheduler, runner = core.scheduler, core.model_executor.driver_worker.worker.model_runner
    seen = Watched()
    schedule, forward = scheduler.schedule, runner.model.forward

    def scheduled(*args: Any, **kwargs: Any) -> Any:
        step = schedule(*args, **kwargs)
        seen.encoded += sum(len(images) for images in step.scheduled_encoder_inputs.values())
        seen.preempted += step.preempted_req_ids or ()
        return step

    def forwarded(*args: Any, positions: Any, **kwargs: Any) -> Any:
        ends = runner.query_start_loc.np
        for i, request_id in enumerate(runner.input_batch.req_ids):
            first = int(runner.input_batch.num_computed_tokens_cpu[i])
            seen.chunks[request_id].append((first, positions[ends[i] : ends[i + 1]].tolist()))
        return forward(*args, positions=positions, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "schedule", scheduled)
        patch.setattr(runner.model, "forward", forwarded)
        yield seen


def forget(llm: Any) -> None:
    """Empties the prefix cache and the encoder cache: the next run starts as the first one did."""
    assert llm.llm_engine.reset_prefix_cache()
    llm.llm_engine.reset_encoder_cache()
