"""Requests that end early in any way: their blocks are freed, and the other answers stay right."""

from __future__ import annotations

import random
from typing import Any

import pytest

from foldserve.server.engine import fair_steps
from foldserve.server.engine.fair_queue import KEY
from tests.engine.conftest import LAYERS
from tests.engine.withdrawal.conftest import Expected
from tests.engine.withdrawal.harness import AskedCase, Case, Engine, words

K = LAYERS // 2
TOKENS = 6


def dialogue(
    begin: int, photos: tuple[int, ...], between: int, question: int, withdraw: bool | tuple[bool, ...] = True
) -> Case:
    """One of three beginnings, each photo with `between` words behind it, a question: many share a prefix."""
    beginning = ["", words(1, 7), words(2, 40)][begin]
    return Case(f"{beginning} {f'<image> {words(3, between)} ' * len(photos)}{words(question, 9)}", photos, withdraw)


CASES = [
    dialogue(0, (0,), 3, 1),
    dialogue(0, (0,), 3, 2),
    dialogue(0, (0,), 3, 1, withdraw=False),
    dialogue(1, (0,), 20, 1),
    dialogue(1, (0, 1), 20, 1),
    dialogue(1, (0, 1), 20, 2),
    dialogue(1, (1,), 1, 3),
    dialogue(2, (1,), 1, 3),
    dialogue(2, (1,), 1, 4, withdraw=False),
    dialogue(2, (2, 1), 10, 4),
    dialogue(2, (2, 1), 10, 5, withdraw=(True, False)),
    dialogue(2, (), 0, 5),
    dialogue(1, (2,), 60, 5),
    dialogue(2, (2,), 60, 6),
    Case(f"{words(2, 40)} <image>", (1,)),
    Case(f"{words(2, 40)} <image>", (2,)),
    AskedCase(f"{words(2, 40)} <image> {words(1, 9)}", (1,), asked='{"method": "fastv", "ratio": 0.5}'),
    AskedCase(f"{words(2, 40)} <image> {words(2, 9)}", (1,), asked='{"method": "illava_decoder", "ratio": 0.5}'),
]
KEYS = ("alice", "alice", "alice", "alice", "bob", "alice", "alice", None)
TEXT_ONLY = dialogue(2, (), 0, 5)


class Turns(fair_steps.FairSteps):
    """Notes which steps are for light keys only; a step takes a second for each request in it."""

    def __init__(self) -> None:
        self.now, self.own = 0.0, list[bool]()
        super().__init__(lambda: self.now)

    def note_planned(self, output: object, *, own: bool, computes: bool, decodes: bool) -> None:
        self.own.append(own)
        super().note_planned(output, own=own, computes=computes, decodes=decodes)

    def note_results(self, output: Any) -> None:
        self.now += len(output.num_scheduled_tokens)
        super().note_results(output)


def test_a_thousand_requests_with_random_aborts(
    small_pool: Engine, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three keys, one of which has most; the others often get steps of their own."""
    monkeypatch.setattr(fair_steps, "ALLOWED", 1.2)
    turns = Turns()
    monkeypatch.setattr(small_pool.scheduler, "_steps", turns)
    rng = random.Random(0)
    waiting = {f"request-{i}": rng.choice(CASES) for i in range(1000)}
    order = list(waiting)
    alive: dict[str, Case] = {}
    finished = aborted = 0
    while order or alive:
        while order and len(alive) < rng.randint(6, 14):
            request_id = order.pop()
            alive[request_id] = waiting[request_id]
            small_pool.add(request_id, alive[request_id], TOKENS, extra_args={KEY: KEYS[len(order) % len(KEYS)]})
        for request_id in [r for r in alive if rng.random() < 0.02]:
            small_pool.abort([request_id])
            del alive[request_id]
            aborted += 1
        for output in small_pool.step():
            if output.finished and output.request_id in alive:
                expected.check(K, alive.pop(output.request_id), output)
                finished += 1
    assert finished > 500 and aborted > 150
    assert 0.1 < sum(turns.own) / len(turns.own) < 0.7
    small_pool.assert_all_blocks_free()


@pytest.mark.parametrize("steps", [0, 1, 2, 4, 6, 9], ids=lambda steps: f"after {steps} steps")
def test_abort_in_every_phase(small_chunks: Engine, expected: Expected, steps: int) -> None:
    """Chunks of 50 tokens: not yet scheduled, in the text before the image, inside it, behind it, decoding."""
    small_chunks.assert_all_blocks_free()
    victim = Case(f"{words(steps, 30)} <image> {words(steps + 1, 60)}", (3,))
    small_chunks.add("victim", victim, 40)
    for _ in range(steps):
        small_chunks.step()
    small_chunks.add("other", CASES[3], TOKENS)
    small_chunks.abort(["victim"])
    outputs = []
    while small_chunks.llm.llm_engine.has_unfinished_requests():
        outputs += [output for output in small_chunks.step() if output.finished]
    assert [output.request_id for output in outputs] == ["other"]
    expected.check(K, CASES[3], outputs[0])
    small_chunks.assert_all_blocks_free()


def test_prompt_logprobs_with_a_withdrawn_image_are_refused(small_chunks: Engine, expected: Expected) -> None:
    with pytest.raises(ValueError, match="prompt_logprobs=1 does not go with withdrawn images"):
        small_chunks.add("refused", CASES[0], TOKENS, prompt_logprobs=1)
    small_chunks.abort(["refused"])
    small_chunks.add("text", TEXT_ONLY, TOKENS, prompt_logprobs=1)
    while small_chunks.llm.llm_engine.has_unfinished_requests():
        for output in small_chunks.step():
            if output.finished:
                expected.check(K, TEXT_ONLY, output)
    small_chunks.assert_all_blocks_free()
