"""Waiting requests: first come, first served within an API key, and the keys in turn."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator

from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import Request, RequestStatus

KEY = "foldserve_key"
"""Entry of `SamplingParams.extra_args`: name of the request's API key. Clients can't set `extra_args`."""


_MAY_RUN = (RequestStatus.WAITING, RequestStatus.PREEMPTED)  # others wait for a grammar: they leave and come back


def key_of(request: Request) -> str | None:
    extra = request.sampling_params and request.sampling_params.extra_args
    return extra.get(KEY) if extra else None


class FairQueue(RequestQueue):
    """vLLM's first-come-first-served queue with a line per key.

    The key with the fewest running requests comes first; ties go to the key that was served longest ago. A key runs at
    most `most` requests, which leaves room for other keys; requests without a key have no such limit.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lines: dict[str | None, deque[Request]] = {}  # in the order of their turns; none is empty
        self._running: Counter[str | None] = Counter()
        self._only: frozenset[str | None] | None = None

    @property
    def keys(self) -> Iterable[str | None]:
        """Keys with waiting requests."""
        return self._lines.keys()

    def begin_step(self, running: Counter[str | None], only: frozenset[str | None] | None = None) -> None:
        """Set how many requests of each key run (`pop_request` adds to them), and the only keys to serve."""
        self._running, self._only = running, only

    def add_request(self, request: Request) -> None:
        self._lines.setdefault(key_of(request), deque()).append(request)

    def peek_request(self) -> Request:
        return self._lines[self._next()][0]

    def pop_request(self) -> Request:
        key = self._next()
        line = self._lines.pop(key)
        request = line.popleft()
        self._running[key] += request.status in _MAY_RUN
        if line:
            self._lines[key] = line
        return request

    def prepend_request(self, request: Request) -> None:
        key = key_of(request)
        if key in self._lines:
            self._lines[key].appendleft(request)
        else:
            self._lines = {key: deque([request]), **self._lines}

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.prepend_request(request)

    def remove_request(self, request: Request) -> None:
        self._lines[key_of(request)].remove(request)
        self._drop_empty_lines()

    def remove_requests(self, requests: Iterable[Request]) -> None:
        removed = set(requests)
        for key in {key_of(request) for request in removed} & self._lines.keys():
            self._lines[key] = deque(request for request in self._lines[key] if request not in removed)
        self._drop_empty_lines()

    def __bool__(self) -> bool:
        """Whether any request may run in this step; `len` counts all waiting requests."""
        return any(self._may_run(key) for key in self._lines)

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Request]:
        for line in self._lines.values():
            yield from line

    def _may_run(self, key: str | None) -> bool:
        if self._only is not None and key not in self._only:
            return False
        return key is None or self._running[key] < self._most

    def _next(self) -> str | None:
        return min(filter(self._may_run, self._lines), key=self._running.__getitem__)

    def _drop_empty_lines(self) -> None:
        self._lines = {key: line for key, line in self._lines.items() if line}
