"""T(x) and the batch arrays against loops over single tokens, on random requests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foldserve.server.engine.identity import ItemIdentity
from foldserve.server.engine.withdrawal.batch import NOT_STORED, BatchMaps
from foldserve.server.engine.withdrawal.core import TokenMap, TokenSelection
from foldserve.server.engine.withdrawal.requests import StepCapacity, refuse_prompt, refuse_request


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


def image(number: int, decoder: str, kept: int, place: Placeholder) -> Image:
    return Image(str(ItemIdentity(f"image{number}", None, decoder, kept)), place)


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    """Texts and images in turn; an image may hold positions without embedding, and may end the prompt."""
    kept: list[bool] = []
    images = []
    for i in range(draw(st.integers(0, 3))):
        kept += [True] * draw(st.integers(0, 7))
        embeds = tuple(draw(st.lists(st.booleans(), min_size=1, max_size=9)))
        if draw(st.booleans()):
            images.append(Image(f"image{i}", Placeholder(len(kept), embeds)))
            kept += [True] * len(embeds)
        elif draw(st.booleans()):
            images.append(image(i, "withdraw", 0, Placeholder(len(kept), embeds)))
            kept += [not embed for embed in embeds]
        else:
            chosen = draw(st.integers(1, 4))
            gone = draw(st.integers(1, 5))
            images.append(image(i, "fastv", chosen, Placeholder(len(kept), (True,) * (gone + chosen))))
            kept += [False] * gone + [True] * chosen
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
    if prompt.map.selections:
        assert prompt.map.shareable == prompt.map.selections[0].start
    elif all(agree):
        assert prompt.map.shareable is None
    else:
        assert prompt.map.shareable == agree.index(False) - 1


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[Prompt], list[int], list[int]]:
    batch = draw(st.lists(prompts(), min_size=1, max_size=4))
    longest = draw(st.sampled_from([1, 12]))
    computed = [draw(st.integers(0, len(p.kept) + 3)) for p in batch]
    scheduled = [draw(st.integers(1, longest)) for _ in batch]
    for r, p in enumerate(batch):
        if computed[r] < p.map.whole and longest == 1:
            computed[r] = p.map.whole
        elif computed[r] < p.map.whole:  # as the scheduler does it
            computed[r], scheduled[r] = 0, p.map.whole + draw(st.integers(0, 3))
    return batch, computed, scheduled


@given(steps())
def test_deep_batch_equals_a_loop_over_tokens(step: tuple[list[Prompt], list[int], list[int]]) -> None:
    batch, computed, scheduled = step
    got = BatchMaps([p.map for p in batch]).step(np.array(computed), np.array(scheduled))
    rows: list[int] = []
    owners, positions, seq_lens, chosen = [], [], [], []
    row = 0
    for r, (p, c, n) in enumerate(zip(batch, computed, scheduled, strict=True)):
        if c < p.map.whole:
            chosen.append((row, len(rows), p))
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
    assert [(prompt.row, prompt.tokens) for prompt in got.prompts] == [(row, p.map.whole) for row, _, p in chosen]
    for prompt, (row, deep_row, p) in zip(got.prompts, chosen, strict=True):
        assert len(prompt.images) == len(p.map.selections) > 0
        for image, (method, start, tokens, kept) in zip(prompt.images, p.map.selections, strict=True):
            assert (image.method, image.row, image.tokens, image.kept) == (method, row + start, tokens, kept)
            placed = rows[image.deep_row : image.deep_row + kept]
            assert image.deep_row >= deep_row and placed == list(
                range(row + start + tokens - kept, row + start + tokens)
            )


@pytest.mark.parametrize(("computed", "scheduled"), [(0, 9), (1, 9)])
def test_a_cut_prompt_whose_tokens_are_to_be_chosen_is_an_error(computed: int, scheduled: int) -> None:
    maps = BatchMaps([TokenMap([], 10, [TokenSelection("fastv", 2, 5, 3)])])
    with pytest.raises(RuntimeError, match=f"{computed}..\\+9 of a prompt of 10, to be whole"):
        maps.step(np.array([computed]), np.array([scheduled]))


def test_a_step_without_withdrawn_tokens_is_nobodys_business() -> None:
    text, image = TokenMap([], 9), TokenMap([(4, 8)], 9)
    assert BatchMaps([text, text]).step(np.array([0, 4]), np.array([9, 1])) is None
    assert BatchMaps([text, image]).step(np.array([0, 0]), np.array([9, 4])) is None


@pytest.mark.parametrize("embeds", [(True,) * 4, (True, False) * 5])
def test_choosing_all_tokens_of_an_image_or_of_pieces_is_an_error(embeds: tuple[bool, ...]) -> None:
    with pytest.raises(ValueError, match="fastv chooses 4 of more tokens"):
        TokenMap.of([image(3, "fastv", 4, Placeholder(3, embeds))], 20)


def test_prompt_logprobs_and_sessions_are_refused_only_with_withdrawal() -> None:
    refuse_request(withdraws=False, prompt_logprobs=1, resumable=True)
    refuse_request(withdraws=True)
    with pytest.raises(ValueError, match="prompt_logprobs=0 does not go with withdrawn images"):
        refuse_request(withdraws=True, prompt_logprobs=0)
    with pytest.raises(ValueError, match="streaming-input session"):
        refuse_request(withdraws=True, resumable=True)


def test_prompts_that_do_not_fit_into_a_step_or_end_in_the_image_are_refused() -> None:
    room = StepCapacity(20, "--max-num-batched-tokens 30 less one for each of 10 other sequences")
    chosen = [TokenSelection("fastv", 2, 5, 3)]
    refuse_prompt(TokenMap([(0, 4)], 99), 99, room)
    refuse_prompt(TokenMap([], 20, chosen), 20, room)
    with pytest.raises(
        ValueError, match=r"it has 21 tokens, and a step has room for 20 \(--max-num-batched-tokens 30 "
    ):
        refuse_prompt(TokenMap([], 21, chosen), 21, room)
    with pytest.raises(ValueError, match="the prompt's last token, which has to be text"):
        refuse_prompt(TokenMap([], 7, chosen), 7, room)
