"""Which tokens the deep layers keep: pure functions that the scheduler and the workers share.

VTW ("Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid Inference", Eq. 5), restated per
token: at layers >= K a token attends only to earlier *kept* tokens, positions unchanged. Everything follows from
T(x), the number of tokens that the deep layers keep among a request's first x tokens.

FastV and iLLaVA's decoder merge keep some tokens of an image. The device decides which, but their number is known
before. Such a prompt is computed in one step (`TokenMap.whole`), so only the counts of T have to be right.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import NamedTuple, Protocol

import numpy as np

from foldserve.server.engine.identity import WITHDRAW, ItemIdentity

Range = tuple[int, int]  # half-open [start, end) of token indices in a request


class _Placeholder(Protocol):
    def extract_embeds_range(self) -> list[Range]:
        """Inclusive (first, last) token indices that hold embeddings."""


class Feature(Protocol):
    """The attributes of vLLM's `MultiModalFeatureSpec` that are read."""

    @property
    def identifier(self) -> str: ...
    @property
    def mm_position(self) -> _Placeholder: ...


class TokenSelection(NamedTuple):
    """An image, tokens [start, start + tokens) of a request, of which `method` keeps `kept`."""

    method: str
    start: int
    tokens: int
    kept: int


class TokenMap:
    """T(x) of one request. Immutable; x counts tokens of the whole sequence, generated ones included.

    Vision tokens are identified by the image's position, not by their id, since a model may generate the same id.

    Attributes:
        ranges: withdrawn tokens; for an image with a choice the first ones, as stand-ins for those not chosen.
        choices: images of which some tokens are chosen.
        whole: tokens to compute in one step, from the first on: the whole prompt if there is a choice, else 0.
        shareable: length of the prefix whose KV blocks may be shared; None: all. It ends before the first choice, which
            depends on later tokens. A prompt that *ends* in a withdrawn token keeps that token at all layers, because
            the first output is sampled from it; its T then differs from that of a longer prompt.
    """

    __slots__ = ("_before", "_ends", "lengths", "ranges", "selections", "shareable", "starts", "whole")

    def __init__(self, ranges: Iterable[Range], prompt_tokens: int, selections: Iterable[TokenSelection] = ()) -> None:
        """Takes withdrawn ranges and chosen images, all disjoint, inside a prompt of `prompt_tokens` tokens."""
        self.selections = tuple(sorted(selections, key=lambda choice: choice.start))
        self.whole = prompt_tokens if self.selections else 0
        ordered = sorted([*ranges, *((c.start, c.start + c.tokens - c.kept) for c in self.selections)])
        self.shareable: int | None = None
        if ordered and ordered[-1][1] == prompt_tokens:
            self.shareable = prompt_tokens - 1
            ordered[-1] = (ordered[-1][0], prompt_tokens - 1)
        if self.selections:
            self.shareable = self.selections[0].start
        self.ranges = tuple((start, end) for start, end in ordered if start < end)
        self._ends = [end for _, end in self.ranges]
        self.starts = np.array([start for start, _ in self.ranges], dtype=np.int64)
        self.lengths = np.array([end - start for start, end in self.ranges], dtype=np.int64)
        self._before: list[int] = [0, *self.lengths.cumsum().tolist()]  # withdrawn tokens before the i-th range

    @classmethod
    def of(cls, features: Iterable[Feature], prompt_tokens: int) -> TokenMap:
        """The map of a request from its multimodal features; the identity if nothing is withdrawn.

        Raises:
            ValueError: an image with a choice has too few tokens, or text between its tokens.
        """
        ranges: list[Range] = []
        selections: list[TokenSelection] = []
        for feature in features:
            item = ItemIdentity.parse(feature.identifier)
            if item.decoder is None:
                continue
            pieces = [(first, last + 1) for first, last in feature.mm_position.extract_embeds_range()]
            if item.decoder == WITHDRAW:
                ranges += pieces
            else:
                selections.append(_token_selection(item.decoder, item.kept, pieces))
        return cls(ranges, prompt_tokens, selections)

    @property
    def total(self) -> int:
        """Withdrawn tokens of the whole request."""
        return self._before[-1]

    def withdrawn(self, x: int) -> int:
        """x - T(x)."""
        if not self._ends or x >= self._ends[-1]:  # every decode step
            return self._before[-1]
        i = bisect_right(self._ends, x)
        return self._before[i] + max(0, x - self.ranges[i][0])

    def kept(self, x: int) -> int:
        """T(x)."""
        return x - self.withdrawn(x)


def _token_selection(method: str, kept: int, pieces: list[Range]) -> TokenSelection:
    (start, end), *more = pieces
    if more or end - start <= kept:
        raise ValueError(f"{method} chooses {kept} of more tokens, all in one piece; the image has {pieces}")
    return TokenSelection(method, start, end - start, kept)
