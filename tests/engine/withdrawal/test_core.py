"""T(x) and the batch arrays against loops over single tokens, on random requests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foldserve.server.engine.withdrawal.batch import NOT_STORED, BatchMaps
from foldserve.server.engine.withdrawal.core import TokenMap, mark, unmark
from foldserve.server.engine.withdrawal.requests import refuse_request


@dataclass(frozen=True)
class Placeholder:
    offset: int
    embeds: tuple[bool, ...]

    def extract_embeds_range(self) -> list[tuple[int, int]]:
        edges = np.flatnonzero(np.diff([0, *self.embeds, 0]))
        return [(self.offset + int(a), self.offset + int(b) - 1) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@dataclass(frozen=True)
class Image:
    identifier: str
    mm_position: Placeholder


@dataclass(frozen=True)
class Prompt:
    """A request's images, its prompt length, and per token of the prompt whether the deep layers keep it."""

    images: tuple[Image, ...]
    kept: tuple[bool, ...]

    @property
    def map(self) -> TokenMap:
        return TokenMap.of(self.images, len(self.kept))

    def naive(self, x: int) -> int:
        return sum(self.kept[:x]) + max(0, x - len(self.kept))


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    """Texts and images in turn; an image may hold positions without embedding, and may end the prompt."""
    kept: list[bool] = []
    images = []
    for i in range(draw(st.integers(0, 3))):
        kept += [True] * draw(st.integers(0, 7))
        embeds = tuple(draw(st.lists(st.booleans(), min_size=1, max_size=9)))
        kept_deep = draw(st.none() | st.integers(0, 4))
        identifier = f"image{i}" if kept_deep is None else mark(f"image{i}", kept_deep)
        images.append(Image(identifier, Placeholder(len(kept), embeds)))
        spare = sum(embeds) if kept_deep is None else kept_deep
        stays = []
        for embed in reversed(embeds):
            stays.append(not embed or spare > 0)
            spare -= embed
        kept += stays[::-1]
    kept += [True] * draw(st.integers(0 if kept else 1, 7))
    kept[-1] = True  # the output is sampled from the last token
    return Prompt(tuple(images), tuple(kept))


@given(prompts())
def test_kept_tokens_of_every_prefix_equal_a_loop(prompt: Prompt) -> None:
    for x in range(len(prompt.kept) + 5):
        assert prompt.map.kept(x) == prompt.naive(x)
        assert prompt.map.withdrawn(x) == x - prompt.naive(x)
    assert prompt.map.total == len(prompt.kept) - sum(prompt.kept)


@given(prompts())
def test_shareable_prefix_is_where_a_longer_prompt_has_the_same_map(prompt: Prompt) -> None:
    longer = TokenMap.of(prompt.images, len(prompt.kept) + 1)
    agree = [prompt.map.kept(x) == longer.kept(x) for x in range(len(prompt.kept) + 5)]
    if all(agree):
        assert prompt.map.shareable is None
    else:
        assert prompt.map.shareable == agree.index(False) - 1


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[Prompt], list[int], list[int]]:
    batch = draw(st.lists(prompts(), min_size=1, max_size=4))
    computed = [draw(st.integers(0, len(p.kept) + 3)) for p in batch]
    longest = draw(st.sampled_from([1, 12]))
    return batch, computed, [draw(st.integers(1, longest)) for _ in batch]


@given(steps())
def test_deep_batch_equals_a_loop_over_tokens(step: tuple[list[Prompt], list[int], list[int]]) -> None:
    batch, computed, scheduled = step
    got = BatchMaps([p.map for p in batch]).step(np.array(computed), np.array(scheduled))
    rows, owners, positions, seq_lens = [], [], [], []
    row = 0
    for r, (p, c, n) in enumerate(zip(batch, computed, scheduled, strict=True)):
        for x in range(c, c + n):
            if p.naive(x + 1) > p.naive(x):
                rows.append(row)
                owners.append(r)
                positions.append(p.naive(x))
            row += 1
        seq_lens.append(p.naive(c + n))
    if all(length == c + n for length, c, n in zip(seq_lens, computed, scheduled, strict=True)):
        assert got is None
        return
    assert got is not None
    if max(scheduled) == 1:
        assert got.rows is None and got.requests is None
        assert got.request_of.tolist() == list(range(len(batch)))
        stored = dict(zip(owners, positions, strict=True))
        assert got.positions.tolist() == [stored.get(r, NOT_STORED) for r in range(len(batch))]
        assert got.seq_lens.tolist() == [max(length, 1) for length in seq_lens]
        assert got.query_lens.tolist() == [1] * len(batch)
        return
    present = sorted(set(owners))
    assert (list(range(row)) if got.rows is None else got.rows.tolist()) == rows
    assert (got.rows is None) == (len(rows) == row)
    assert (list(range(len(batch))) if got.requests is None else got.requests.tolist()) == present
    assert [present[r] for r in got.request_of] == owners
    assert got.positions.tolist() == positions
    assert got.query_lens.tolist() == [owners.count(r) for r in present]
    assert got.seq_lens.tolist() == [seq_lens[r] for r in present]


def test_a_step_without_withdrawn_tokens_is_nobodys_business() -> None:
    text, image = TokenMap([], 9), TokenMap([(4, 8)], 9)
    assert BatchMaps([text, text]).step(np.array([0, 4]), np.array([9, 1])) is None
    assert BatchMaps([text, image]).step(np.array([0, 0]), np.array([9, 4])) is None


@pytest.mark.parametrize("kept_deep", [0, 1, 40])
def test_mark_and_unmark_are_inverse(kept_deep: int) -> None:
    assert unmark(mark("lora:3f~deep", kept_deep)) == ("lora:3f~deep", kept_deep)
    assert unmark("3f") == ("3f", None)


def test_mark_refuses_a_second_mark_and_negative_counts() -> None:
    with pytest.raises(ValueError, match="marked already"):
        mark(mark("3f"))
    with pytest.raises(ValueError, match="at least 0, got -1"):
        mark("3f", -1)


def test_prompt_logprobs_and_sessions_are_refused_only_with_withdrawal() -> None:
    refuse_request(withdraws=False, prompt_logprobs=1, resumable=True)
    refuse_request(withdraws=True)
    with pytest.raises(ValueError, match="prompt_logprobs=0 does not go with withdrawn images"):
        refuse_request(withdraws=True, prompt_logprobs=0)
    with pytest.raises(ValueError, match="streaming-input session"):
        refuse_request(withdraws=True, resumable=True)
