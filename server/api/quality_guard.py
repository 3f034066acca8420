"""Measures on the server's own requests whether reduction changes answers: one in so many reduced answers is scored
with all vision tokens, while nobody waits for an answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

from prometheus_client import Counter, Histogram
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams

from foldserve.server.api.metrics import ratio_bucket
from foldserve.server.api.usage import VisionTokens
from foldserve.server.auto import AutoChoice

_LABELS = ["method", "ratio_bucket", "group"]
_CHECKED = Counter(
    "foldserve_checked_answers",
    "Reduced answers that were scored with all vision tokens: whether a greedy one would have been another "
    "(`changed`: yes, no; sampled: of one that was drawn at random nobody can tell).",
    [*_LABELS, "changed"],
)
_KL = Histogram(
    "foldserve_checked_kl_nats",
    "KL(reduced || all tokens) of an answer's tokens, estimated by those that were said: mean of log P - log P_all.",
    _LABELS,
    buckets=(-0.1, 0, 0.0001, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10),
)
_SKIPPED = Counter(
    "foldserve_checks_skipped",
    "Reduced answers that were to be checked and were not: the server was never idle (busy), or the request with all "
    "vision tokens is not possible (impossible).",
    ["reason"],
)
_RAISED = Counter(
    "foldserve_auto_raised", "Times that a group's count was raised, since too many of its answers changed.", ["group"]
)
_MOST_WAITING = 16
_LOOK_S = 0.05
_WINDOW = 200  # checked answers of a group that decide whether its count is raised
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class CheckedAnswer:
    """The answer to a request that is to be checked.

    Attributes:
        vision: what was removed.
        salts: of the caches of blocks and of images, see `cache_salts`.
        is_greedy: each token was the likeliest one.
        token_ids: of the first choice, with their `logprobs`.
    """

    body: Mapping[str, Any]
    vision: VisionTokens
    salts: tuple[str | None, str | None] = (None, None)
    is_greedy: bool = False
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def add_output(self, output: RequestOutput) -> None:
        for choice in output.outputs:
            if choice.index == 0:
                self.token_ids += choice.token_ids
                self.logprobs += [each[token].logprob for token, each in _pairs(choice.token_ids, choice.logprobs)]


def _pairs(token_ids: Sequence[int], logprobs: Any) -> Iterator[tuple[int, Mapping[int, Any]]]:
    return zip(token_ids, logprobs or (), strict=True)


def is_greedy(params: SamplingParams) -> bool:
    """Whether each token is the one that the model finds likeliest, with no other rule in between."""
    return (
        params.temperature == 0
        and params.presence_penalty == params.frequency_penalty == 0
        and params.repetition_penalty == 1
        and params.min_tokens == 0
        and not (params.logit_bias or params.bad_words or params.allowed_token_ids or params.structured_outputs)
    )


@dataclass(frozen=True, slots=True)
class AnswerScore:
    """An answer's tokens, scored with all vision tokens; rank 1 is the likeliest token."""

    ranks: Sequence[int]
    logprobs: Sequence[float]


class QualityGuard:
    """Checks answers, and raises the token count of a group whose answers change too often.

    Args:
        every: reduced answers per checked one; 0: none is checked.
        score: asks the engine; None where the request is not possible with all vision tokens.
        is_idle: nobody waits for an answer.
        raise_count: of a group of `ratio: "auto"`.
    """

    def __init__(
        self,
        every: int,
        score: Callable[[CheckedAnswer], Awaitable[AnswerScore | None]],
        is_idle: Callable[[], bool],
        raise_count: Callable[[str], None],
    ) -> None:
        self._every, self._score, self._is_idle, self._raise_count = every, score, is_idle, raise_count
        self._seen = 0
        self._waiting: deque[CheckedAnswer] = deque()
        self._windows: dict[str, deque[bool]] = {}
        self._came = asyncio.Event()

    def should_check_next(self) -> bool:
        """Whether the next reduced answer should be checked; counts it."""
        self._seen += 1
        return self._every > 0 and self._seen % self._every == 0

    def enqueue(self, answer: CheckedAnswer) -> None:
        """Queues an answer; a full queue drops its oldest one."""
        if not answer.token_ids:
            return
        if len(self._waiting) == _MOST_WAITING:
            self._waiting.popleft()
            _SKIPPED.labels("busy").inc()
        self._waiting.append(answer)
        self._came.set()

    async def run(self) -> None:
        while True:
            await self._came.wait()
            if not self._is_idle():
                await asyncio.sleep(_LOOK_S)
                continue
            answer = self._waiting.popleft()
            if not self._waiting:
                self._came.clear()
            try:
                score = await self._score(answer)
            except Exception:  # no user's request fails here
                _log.warning("a check of an answer failed", exc_info=True)
                score = None
            if score is None:
                _SKIPPED.labels("impossible").inc()
            else:
                self._record(answer, score)

    def _record(self, answer: CheckedAnswer, score: AnswerScore) -> None:
        vision, auto = answer.vision, answer.vision.auto
        labels = (vision.method, ratio_bucket(vision), "" if auto is None else auto.label)
        changed = any(rank != 1 for rank in score.ranks)
        _CHECKED.labels(*labels, ("yes" if changed else "no") if answer.is_greedy else "sampled").inc()
        gaps = [own - full for own, full in zip(answer.logprobs, score.logprobs, strict=True)]
        _KL.labels(*labels).observe(sum(gaps) / len(gaps))
        if auto is not None and auto.target is not None and answer.is_greedy:
            self._watch(auto, auto.target, changed)

    def _watch(self, auto: AutoChoice, target: float, changed: bool) -> None:
        """Raises a group's count once more of its last answers changed than the target and chance explain."""
        window = self._windows.setdefault(auto.group, deque(maxlen=_WINDOW))
        window.append(changed)
        share = sum(window) / len(window)
        if len(window) < _WINDOW or share <= target + 2 * sqrt(target / _WINDOW):
            return
        window.clear()
        self._raise_count(auto.group)
        _RAISED.labels(auto.group).inc()
        _log.warning(
            "%.1f %% of the last %d checked answers of group %r changed, where %.1f %% may: its count is raised by a "
            "step; run `foldserve calibrate --auto` again",
            100 * share,
            _WINDOW,
            auto.group,
            100 * target,
        )
