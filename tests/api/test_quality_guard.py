"""Which answers are checked, and when a group's count is raised; the engine's part is in test_demo_server.py."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import REGISTRY
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput

from foldserve.reducers.item import Layout, plan_item
from foldserve.reducers.plan import Reduction, VisionGeometry
from foldserve.server.api.quality_guard import AnswerScore, CheckedAnswer, QualityGuard
from foldserve.server.api.usage import VisionTokens
from foldserve.server.auto import AutoChoice

PLAN = plan_item(Reduction(ratio=0.5), Layout.single(VisionGeometry(16)))


def answer(choice: AutoChoice | None, *, greedy: bool = True) -> CheckedAnswer:
    vision = VisionTokens((PLAN,), ("image",), (0,), None, choice)
    return CheckedAnswer({}, vision, is_greedy=greedy, token_ids=[5, 6], logprobs=[-0.5, -0.25])


async def checked(answers: list[CheckedAnswer], changed: list[bool], *, idle: bool = True) -> list[str]:
    """The groups whose counts are raised."""
    raised: list[str] = []
    ranks = iter(changed)

    async def score(one: CheckedAnswer) -> AnswerScore | None:
        return AnswerScore([1, 2 if next(ranks) else 1], [-1.0, -0.75])

    guard = QualityGuard(1, score, lambda: idle, raised.append)
    task = asyncio.create_task(guard.run())
    for one in answers:
        guard.enqueue(one)
        if idle:
            for _ in range(5):
                await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    task.cancel()
    return raised


@pytest.mark.parametrize(("wrong", "raises"), [(16, 0), (17, 1)])
def test_a_count_is_raised_where_chance_does_not_explain_the_changes(wrong: int, raises: int) -> None:
    """0.05 + 2 sqrt(0.05 / 200) is 16.3 of 200."""
    choice = AutoChoice(4, "g", 0.05)
    found = asyncio.run(checked([answer(choice)] * 200, [True] * wrong + [False] * (200 - wrong)))
    assert found == ["g"] * raises


def test_the_next_raise_takes_two_hundred_answers_more() -> None:
    choice = AutoChoice(4, "h", 0.05)
    assert asyncio.run(checked([answer(choice)] * 399, [True] * 399)) == ["h"]
    assert asyncio.run(checked([answer(choice)] * 400, [True] * 400)) == ["h", "h"]


@pytest.mark.parametrize(
    "one",
    [
        answer(None),
        answer(AutoChoice(4, "g", None, 2)),  # under pressure nothing was promised
        answer(AutoChoice(4, "g", 0.05), greedy=False),
    ],
    ids=["a ratio", "no promise", "sampled"],
)
def test_what_promises_nothing_raises_nothing(one: CheckedAnswer) -> None:
    assert asyncio.run(checked([one] * 250, [True] * 250)) == []


def test_a_busy_server_checks_nothing_and_forgets_the_oldest() -> None:
    def skipped() -> float:
        return REGISTRY.get_sample_value("foldserve_checks_skipped_total", {"reason": "busy"}) or 0.0

    before = skipped()
    assert asyncio.run(checked([answer(None)] * 20, [], idle=False)) == []
    assert skipped() - before == 4


def test_the_estimate_of_kl_is_the_mean_gap_of_the_answers_tokens() -> None:
    labels = {"method": "folder", "ratio_bucket": "<=0.5", "group": "kl"}
    asyncio.run(checked([answer(AutoChoice(8, "kl", 0.05))], [False]))
    below = [
        REGISTRY.get_sample_value("foldserve_checked_kl_nats_bucket", labels | {"le": le}) for le in ("0.3", "1.0")
    ]
    assert below == [0, 1]  # (-0.5 + 1.0 - 0.25 + 0.75) / 2


@pytest.mark.parametrize(("every", "wanted"), [(0, []), (1, [1, 2, 3, 4, 5, 6]), (3, [3, 6])])
def test_one_of_so_many_is_wanted(every: int, wanted: list[int]) -> None:
    async def score(one: CheckedAnswer) -> AnswerScore | None:
        raise AssertionError

    async def wants() -> list[int]:
        guard = QualityGuard(every, score, lambda: True, list[str]().append)
        return [number for number in range(1, 7) if guard.should_check_next()]

    assert asyncio.run(wants()) == wanted


def test_pieces_of_a_stream_are_put_together() -> None:
    def piece(*tokens: int, index: int = 0) -> RequestOutput:
        logprobs = [{token: Logprob(-token / 8)} for token in tokens]
        choice = CompletionOutput(index, "", tokens, None, logprobs)
        return RequestOutput("id", None, None, None, [choice], finished=False)

    one = CheckedAnswer({}, answer(None).vision)
    for output in (piece(1, 2), piece(9, index=1), piece(3)):
        one.add_output(output)
    assert (one.token_ids, one.logprobs) == ([1, 2, 3], [-0.125, -0.25, -0.375])
