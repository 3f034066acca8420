"""The part of a scheduled step that enters the deep layers, as flat numpy arrays without loops over tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from foldserve.server.engine.withdrawal.core import TokenMap

Ints = NDArray[np.int64]

NOT_STORED = -1  # compact position of a row that writes no KV


@dataclass(frozen=True)
class ImageSelection:
    """An image of which `method` keeps `kept` of `tokens` tokens."""

    method: str
    row: int  # first row of the image in the full batch
    tokens: int
    kept: int
    deep_row: int  # index of the first kept token in `DeepBatch.rows`


@dataclass(frozen=True)
class PromptSelection:
    """A prompt whose `tokens` tokens are all in this step."""

    row: int  # first row of the prompt
    tokens: int
    images: tuple[ImageSelection, ...]  # those of which tokens are chosen


@dataclass(frozen=True, eq=False)
class DeepBatch:
    """What the deep layers see of a step with R requests. All arrays are int64.

    A *compact* position is a token's index among its request's kept tokens: its place in the deep KV cache. RoPE
    positions stay. Until `select_tokens` has run, `rows` has arbitrary tokens of an image in place of the chosen ones.
    """

    rows: Ints | None  # (m,) rows of the full batch that enter, ascending; None: all rows, in place
    requests: Ints | None  # (r,) requests that have a row; None: all R
    request_of: Ints  # (m,) index of each row's request among those
    positions: Ints  # (m,) compact position of each row, or NOT_STORED
    query_lens: Ints  # (r,) rows of each request
    seq_lens: Ints  # (r,) kept tokens of each request after this step
    prompts: tuple[PromptSelection, ...] = ()  # those whose image tokens are chosen in this step


class BatchMaps:
    """The `TokenMap`s of a step's requests as flat arrays: a few array operations compute T of all requests."""

    def __init__(self, maps: Sequence[TokenMap]) -> None:
        self.maps = list(maps)
        self._selecting = [r for r, m in enumerate(maps) if m.selections]
        self._owner = np.repeat(np.arange(len(maps)), [len(m.ranges) for m in maps])  # (ranges,) request of each range
        self._start = _concatenate([m.starts for m in maps])
        self._length = _concatenate([m.lengths for m in maps])

    @property
    def withdraws(self) -> bool:
        return len(self._owner) > 0

    def withdrawn(self, x: Ints) -> Ints:
        """(R,) withdrawn tokens among the first x[r] tokens of each request r."""
        inside = np.clip(x[self._owner] - self._start, 0, self._length)
        return np.bincount(self._owner, inside, minlength=len(x)).astype(np.int64)

    def step(self, computed: Ints, scheduled: Ints) -> DeepBatch | None:
        """The deep part of a step; None if the deep layers see the whole step.

        Args:
            computed: (R,) tokens of each request that are already in the KV cache.
            scheduled: (R,) tokens of each request in this step, at least 1.
        """
        if not self.withdraws:
            return None
        before, after = self.withdrawn(computed), self.withdrawn(computed + scheduled)
        if not after.any():
            return None
        kept = scheduled - (after - before)
        seq_lens = computed + scheduled - after
        if scheduled.max() == 1:
            return _in_place(computed - before, kept, seq_lens)
        rows = None if np.array_equal(kept, scheduled) else self._kept_rows(computed, scheduled)
        requests = np.flatnonzero(kept)
        if len(requests) == len(kept):
            batch = _compact(rows, None, kept, seq_lens)
        else:
            batch = _compact(rows, requests, kept[requests], seq_lens[requests])
        return replace(batch, prompts=self._prompts(computed, scheduled, kept)) if self._selecting else batch

    def _prompts(self, computed: Ints, scheduled: Ints, kept: Ints) -> tuple[PromptSelection, ...]:
        row, deep_row = np.cumsum(scheduled) - scheduled, np.cumsum(kept) - kept
        starting = [r for r in self._selecting if computed[r] < self.maps[r].whole]
        for r in starting:
            if computed[r] or scheduled[r] < self.maps[r].whole:  # the scheduler prevents this
                raise RuntimeError(
                    f"tokens {computed[r]}..+{scheduled[r]} of a prompt of {self.maps[r].whole}, to be whole"
                )
        return tuple(_prompt_selection(self.maps[r], int(row[r]), int(deep_row[r])) for r in starting)

    def _kept_rows(self, computed: Ints, scheduled: Ints) -> Ints:
        """(m,) rows of the full batch outside every withdrawn range, from the +1/-1 edges of the ranges."""
        first_row = np.cumsum(scheduled) - scheduled
        begin = self._start - computed[self._owner]
        limit = scheduled[self._owner]
        edges = np.zeros(int(scheduled.sum()) + 1, dtype=np.int64)
        np.add.at(edges, np.clip(begin, 0, limit) + first_row[self._owner], 1)
        np.add.at(edges, np.clip(begin + self._length, 0, limit) + first_row[self._owner], -1)
        return np.flatnonzero(np.cumsum(edges[:-1]) == 0)


def _prompt_selection(token_map: TokenMap, row: int, deep_row: int) -> PromptSelection:
    images = [
        ImageSelection(c.method, row + c.start, c.tokens, c.kept, deep_row + token_map.kept(c.start))
        for c in token_map.selections
    ]
    return PromptSelection(row, token_map.whole, tuple(images))


def _in_place(positions: Ints, kept: Ints, seq_lens: Ints) -> DeepBatch:
    """A step of one token per request: no row is dropped, since it may replay a full CUDA graph with fixed rows.

    A withdrawn token (a prefill chunk of one token) keeps its row, stores nothing, and is not sampled from. Its length
    is at least 1, because a kernel may require a key per query.
    """
    one = np.ones_like(kept)
    stored = np.where(kept == 1, positions, NOT_STORED)
    return DeepBatch(None, None, np.arange(len(kept)), stored, one, np.maximum(seq_lens, 1))


def _compact(rows: Ints | None, requests: Ints | None, query_lens: Ints, seq_lens: Ints) -> DeepBatch:
    first_row = np.cumsum(query_lens) - query_lens
    request_of = np.repeat(np.arange(len(query_lens)), query_lens)
    positions = np.arange(len(request_of)) + (seq_lens - query_lens - first_row)[request_of]
    return DeepBatch(rows, requests, request_of, positions, query_lens, seq_lens)


def _concatenate(parts: Sequence[Ints]) -> Ints:
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
