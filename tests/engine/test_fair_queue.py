"""Keys are served in turn: in the queue by itself, and in an engine where one key sends all that it can."""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.request_queue import FCFSRequestQueue
from vllm.v1.request import Request, RequestStatus

from foldserve.server.engine.fair_queue import KEY, FairQueue, key_of
from foldserve.server.quality.demo.checkpoint import CHECKPOINT
from tests.engine.conftest import start_engine

SEATS = 10


def params(key: str | None, **fields: Any) -> SamplingParams:
    extra = None if key is None else {KEY: key}
    return SamplingParams(temperature=0, extra_args=extra, output_kind=RequestOutputKind.FINAL_ONLY, **fields)


def request(key: str | None, number: int = 0) -> Request:
    return Request(f"{key}-{number}", [1], params(key), None)


def filled(*keys: str | None, most: int = 100) -> FairQueue:
    queue, numbers = FairQueue(most), Counter[str | None]()
    for key in keys:
        queue.add_request(request(key, numbers[key]))
        numbers[key] += 1
    return queue


def drain(queue: FairQueue) -> list[str]:
    names = []
    while queue:
        first = queue.peek_request()
        assert queue.pop_request() is first
        names.append(first.request_id)
    return names


def test_keys_come_in_turn() -> None:
    queue = filled("a", "a", "a", "b", "a", "c", "c")
    assert drain(queue) == ["a-0", "b-0", "c-0", "a-1", "c-1", "a-2", "a-3"]
    assert len(queue) == 0


def test_who_has_the_fewest_running_comes_first() -> None:
    queue = filled("a", "a", "b", "b", "b")
    queue.begin_step(Counter({"a": 2, "b": 1}))
    assert drain(queue) == ["b-0", "a-0", "b-1", "a-1", "b-2"]


def test_a_key_leaves_room_for_others() -> None:
    queue = filled("a", "a", "a", None, None, None, most=2)
    assert drain(queue) == ["a-0", "None-0", "a-1", "None-1", "None-2"]
    assert len(queue) == 1, "what may not run now still waits"
    queue.begin_step(Counter({"a": 1}))
    assert drain(queue) == ["a-2"]


def test_what_waits_for_its_grammar_is_not_taken_for_running() -> None:
    """Such a request leaves the queue while a step is planned, and returns at its end."""
    queue = filled("a", "a", "a", most=1)
    for blocked in list(queue)[:2]:
        blocked.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    skipped = deque[Request]()
    for _ in range(2):
        skipped.appendleft(queue.pop_request())
    assert drain(queue) == ["a-2"]
    queue.prepend_requests(skipped)
    assert [waiting.request_id for waiting in queue] == ["a-0", "a-1"]


def test_what_was_interrupted_is_the_next_of_its_key() -> None:
    queue = filled("a", "b")
    queue.prepend_request(request("b", 7))
    queue.prepend_request(request("c", 8))
    assert drain(queue) == ["c-8", "a-0", "b-7", "b-0"]


def test_removal() -> None:
    queue = filled("a", "a", "b", "c")
    a0, a1, b0, _ = queue
    queue.remove_request(a0)
    queue.remove_requests({b0, request("d")})
    assert drain(queue) == [a1.request_id, "c-0"]


@given(st.lists(st.sampled_from(["add", "pop", "prepend", "remove"]), max_size=40))
def test_without_keys_it_is_first_come_first_served(steps: list[str]) -> None:
    fair, stock = FairQueue(1), FCFSRequestQueue()
    for number, step in enumerate(steps):
        new = request(None, number)
        if step == "add":
            fair.add_request(new)
            stock.add_request(new)
        elif step == "prepend":
            fair.prepend_requests([new, again := request(None, -number)])
            stock.prepend_requests([new, again])
        elif step == "pop" and stock:
            assert fair.peek_request() is stock.peek_request()
            assert fair.pop_request() is stock.pop_request()
        elif stock:
            old = stock[len(stock) // 2]
            fair.remove_request(old)
            stock.remove_request(old)
        assert (bool(fair), len(fair), list(fair)) == (bool(stock), len(stock), list(stock))


@given(st.lists(st.sampled_from("aaaabbc"), max_size=40), st.integers(1, 5))
def test_shares_are_even(keys: list[str], most: int) -> None:
    """Whoever is served has no more running than anybody who waits and may run, and each key's order is kept."""
    queue = filled(*keys, most=most)
    running, served = Counter[str | None](), list[str]()
    while queue:
        may = {key_of(waiting) for waiting in queue if running[key_of(waiting)] < most}
        popped = queue.pop_request()
        assert running[key_of(popped)] == min(running[key] for key in may)
        running[key_of(popped)] += 1
        served.append(popped.request_id)
    for key, number in running.items():
        assert number == min(most, keys.count(str(key)))
        assert [name for name in served if name.startswith(f"{key}-")] == [f"{key}-{i}" for i in range(number)]


@pytest.fixture(scope="module")
def llm() -> Any:
    """Blocks for some 15 requests of the test's length: less than wants to run."""
    return start_engine(
        CHECKPOINT,
        scheduler_cls="foldserve.server.engine.scheduler.make_scheduler",
        max_num_seqs=SEATS,
        num_gpu_blocks_override=40,
        max_model_len=512,
    )


def steps_of_a_small_request(llm: Any, flood: int) -> int:
    engine = llm.llm_engine
    for number in range(flood):
        engine.add_request(
            f"alice-{number}", "USER: Tell me all. ASSISTANT:" * 3, params("alice", min_tokens=120, max_tokens=120)
        )
    for _ in range(30 if flood else 0):
        engine.step()
    engine.add_request("bob", "USER: Hello? ASSISTANT:", params("bob", min_tokens=6, max_tokens=6))
    steps = 0
    done: list[str] = []
    while "bob" not in done:
        done += [output.request_id for output in engine.step() if output.finished]
        steps += 1
    engine.abort_request([f"alice-{number}" for number in range(flood)])
    while engine.has_unfinished_requests():
        engine.step()
    return steps


def test_a_flood_costs_another_key_a_step(llm: Any) -> None:
    """Alice has five times as many requests as may run, and blocks of the cache for less than those that run."""
    alone = steps_of_a_small_request(llm, 0)
    beside = steps_of_a_small_request(llm, 5 * SEATS)
    assert beside <= alone + 1
