"""Which tokens the deep layers keep: pure functions that the scheduler and the workers share.

The method is VTW ("Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid Inference",
Eq. 5), restated per token: at layers >= K a token attends only to the earlier *kept* tokens, positions unchanged.
Everything follows from one function of a request, T(x) = tokens that the deep layers keep among its first x tokens.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

_MARK = re.compile(r"~deep(\d+)\Z")

Range = tuple[int, int]
"""Half-open [start, end) of token indices in a request."""


def mark(identifier: str, kept_deep: int = 0) -> str:
    """Identity of an image whose tokens leave the decoder at layer K, all but the last `kept_deep` of them.

    The mark is part of the identity itself, so whatever is cached under the identity (embeddings, KV blocks) belongs to
    one mode, and every process that sees the request knows the mode.

    Raises:
        ValueError: already marked, or a negative count.
    """
    if kept_deep < 0:
        raise ValueError(f"kept_deep counts tokens of an image: must be at least 0, got {kept_deep}")
    if _MARK.search(identifier):
        raise ValueError(f"{identifier!r} is marked already: mark an image's own identity, once")
    return f"{identifier}~deep{kept_deep}"


def unmark(identifier: str) -> tuple[str, int | None]:
    """Inverse of `mark`: the image's own identity, and `kept_deep` or None where no mark is."""
    found = _MARK.search(identifier)
    return (identifier[: found.start()], int(found[1])) if found else (identifier, None)


class _Placeholder(Protocol):
    def extract_embeds_range(self) -> list[Range]:
        """Inclusive (first, last) token indices that hold embeddings."""


class Feature(Protocol):
    """What is read of vLLM's `MultiModalFeatureSpec`."""

    @property
    def identifier(self) -> str: ...
    @property
    def mm_position(self) -> _Placeholder: ...


class TokenMap:
    """T(x) of one request. Immutable; x counts tokens of the whole sequence, generated ones included.

    Vision tokens are known by the position of the image, never by their id: a model may generate the placeholder's id.
    A prompt that *ends* in a withdrawn token keeps that one token at all layers, since the first output is sampled from
    it. Its T then differs from that of a longer prompt with the same beginning: `shareable` is the prefix up to which
    the two agree, and with it the KV blocks that prefix caching may share.
    """

    __slots__ = ("_before", "_ends", "lengths", "ranges", "shareable", "starts")

    def __init__(self, ranges: Iterable[Range], prompt_tokens: int) -> None:
        """Takes disjoint withdrawn ranges inside a prompt of `prompt_tokens` tokens."""
        ordered = sorted(ranges)
        self.shareable: int | None = None
        if ordered and ordered[-1][1] == prompt_tokens:
            self.shareable = prompt_tokens - 1
            ordered[-1] = (ordered[-1][0], prompt_tokens - 1)
        self.ranges = tuple((start, end) for start, end in ordered if start < end)
        self._ends = [end for _, end in self.ranges]
        self.starts = np.array([start for start, _ in self.ranges], dtype=np.int64)
        self.lengths = np.array([end - start for start, end in self.ranges], dtype=np.int64)
        self._before: list[int] = [0, *self.lengths.cumsum().tolist()]  # withdrawn tokens before the i-th range

    @classmethod
    def of(cls, features: Iterable[Feature], prompt_tokens: int) -> TokenMap:
        """The map of a request from its multimodal features; the identity if none is marked."""
        ranges: list[Range] = []
        for feature in features:
            _, kept_deep = unmark(feature.identifier)
            if kept_deep is not None:
                ranges += _all_but_last(kept_deep, feature.mm_position.extract_embeds_range())
        return cls(ranges, prompt_tokens)

    @property
    def total(self) -> int:
        """Tokens withdrawn from the whole request."""
        return self._before[-1]

    def withdrawn(self, x: int) -> int:
        """x - T(x): tokens withdrawn among the first x."""
        if not self._ends or x >= self._ends[-1]:  # every decode step
            return self._before[-1]
        i = bisect_right(self._ends, x)
        return self._before[i] + max(0, x - self.ranges[i][0])

    def kept(self, x: int) -> int:
        """T(x)."""
        return x - self.withdrawn(x)


def _all_but_last(kept: int, inclusive: Sequence[Range]) -> list[Range]:
    """Half-open ranges without the last `kept` tokens of them all together."""
    ranges: list[Range] = []
    for first, last in reversed(inclusive):
        spared = min(kept, last + 1 - first)
        kept -= spared
        ranges.append((first, last + 1 - spared))
    return ranges[::-1]
