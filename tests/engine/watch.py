"""Records an in-process engine's scheduler steps and the rotary positions of each request."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
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
        """Of the requests, in the order in which they were added, those that were never preempted and read no cache."""
        added = sorted(self.chunks, key=lambda name: int(name.partition("-")[0]))  # a count, and a random part
        return [[place for _, chunk in self.chunks[name] for place in chunk] for name in added]


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
        request_ids, starts, ends = batch()
        for i, request_id in enumerate(request_ids):
            seen.chunks[request_id].append((int(starts[i]), positions[ends[i] : ends[i + 1]].tolist()))
        return forward(*args, positions=positions, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        is_v2 = llm.llm_engine.vllm_config.use_v2_model_runner
        batch = _batch_v2(runner, patch) if is_v2 else partial(_batch_v1, runner)
        patch.setattr(scheduler, "schedule", scheduled)
        patch.setattr(runner.model, "forward", forwarded)
        yield seen


Batch = tuple[Sequence[str], Sequence[int], Sequence[int]]
"""Requests of a step, the first token of each in it, and the rows where they begin and end."""


def _batch_v1(runner: Any) -> Batch:
    return runner.input_batch.req_ids, runner.input_batch.num_computed_tokens_cpu, runner.query_start_loc.np


def _batch_v2(runner: Any, patch: pytest.MonkeyPatch) -> Callable[[], Batch]:
    prepare_attn = runner.model_state.prepare_attn
    latest: Any = None

    def prepared(input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal latest
        latest = input_batch
        return prepare_attn(input_batch, *args, **kwargs)

    patch.setattr(runner.model_state, "prepare_attn", prepared)
    return lambda: (latest.req_ids, latest.num_computed_tokens_np, latest.query_start_loc_np)


def encode_in_pieces(llm: Any, tokens: int, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Bounds the tower's batches to so many tokens. The places of each batch are appended to the result."""
    model = llm.llm_engine.model_executor.driver_worker.get_model()
    family, pieces = model.family, []

    def select(inputs: Any, places: Any) -> Any:
        pieces.append(places)
        return type(family).select(family, inputs, places)

    monkeypatch.setattr(model, "_tokens_at_once", tokens)
    monkeypatch.setattr(family, "select", select)
    forget(llm)
    return pieces


def forget(llm: Any) -> None:
    """Empties the prefix cache and the encoder cache: the next run starts as the first one did."""
    assert llm.llm_engine.reset_prefix_cache()
    llm.llm_engine.reset_encoder_cache()
