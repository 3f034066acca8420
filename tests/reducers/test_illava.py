"""iLLaVA's merge and FastV's drop."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foldserve.reducers.fastv import FastV, fastv
from foldserve.reducers.illava import IllavaDecoder, illava, image_score
from tests.reducers.check import (
    Reduce,
    assert_fp32_inside,
    assert_nothing_read,
    assert_partition,
    assert_same_bits_alone,
    draw,
    few,
)
from tests.reducers.naive import naive_illava

shapes = st.tuples(st.integers(1, 3), st.integers(1, 60), st.integers(1, 9))
seeds = st.integers(0, 2**31)


@few
@given(shapes, st.data(), seeds)
def test_same_as_written_token_by_token(shape: tuple[int, int, int], data: st.DataObject, seed: int) -> None:
    batch, n, _ = shape
    r = data.draw(st.integers(0, n - 1))
    x, score = draw(seed, shape, (batch, n), dtype=torch.float64)
    reduced = illava(x, score, r)
    assert_partition(reduced, n, n - r)
    for i in range(batch):
        kept, tokens = naive_illava(x[i], score[i], r)
        assert reduced.source[i].tolist() == kept
        torch.testing.assert_close(reduced.tokens[i], torch.stack(tokens))
        assert sorted(reduced.sizes[i].tolist()) == [1] * (n - r - 1) + [r + 1]


def test_the_least_attended_weighs_most_and_stands_where_the_most_attended_did() -> None:
    """Five tokens, two go: 3, 1 and 4 are attended to least, in this order, and weigh 3/6, 2/6 and 1/6."""
    x = torch.tensor([[[10.0], [600.0], [30.0], [6000.0], [60.0]]])
    score = torch.tensor([[0.9, 0.2, 0.8, 0.1, 0.3]])
    tokens, sizes, source, group = illava(x, score, 2)
    assert tokens.flatten().tolist() == [10, 30, 3000 + 200 + 10]
    assert (source.tolist(), sizes.tolist()) == ([[0, 2, 4]], [[1, 1, 3]])
    assert group.tolist() == [[0, 2, 1, 2, 2]]


def test_of_equal_scores_the_earlier_is_the_lower() -> None:
    assert illava(torch.ones(1, 5, 1), torch.ones(1, 5), 2).source.tolist() == [[2, 3, 4]]
    assert fastv(torch.ones(1, 5, 1), torch.ones(1, 5), 2).source.tolist() == [[2, 3, 4]]


@few
@given(shapes, st.data(), seeds)
def test_text_stays(shape: tuple[int, int, int], data: st.DataObject, seed: int) -> None:
    batch, n, _ = shape
    images = data.draw(st.integers(1, n))
    first = data.draw(st.integers(0, n - images))
    is_image = torch.zeros(batch, n, dtype=torch.bool)
    is_image[:, first : first + images] = True
    r = data.draw(st.integers(0, images - 1))
    x, score = draw(seed, shape, (batch, n))
    scored = image_score(score, is_image)
    left, merged = fastv(x, scored, r), illava(x, scored, r)
    kept = left.source
    assert torch.equal(kept, merged.source)  # with r - 1 below the merged one, both keep the same positions
    text = ~is_image.gather(1, kept)
    assert (text.sum(dim=1) == n - images).all()
    assert torch.equal(merged.tokens[text], x[~is_image])
    assert (kept.diff(dim=1) > 0).all()
    gone = torch.ones(batch, n, dtype=torch.bool).scatter(1, kept, False)
    assert torch.equal(left.tokens.flatten(0, 1), x[~gone])
    assert torch.equal(left.group < 0, gone) and torch.equal(left.sizes, torch.ones_like(kept))
    if r:
        assert (
            score[gone].view(batch, r).amax(dim=1) <= score.masked_fill(gone | ~is_image, torch.inf).amin(dim=1)
        ).all()


@pytest.mark.parametrize("method", [illava, fastv])
@few
@given(shapes, seeds)
def test_one_image_does_not_feel_the_others(method: Reduce, shape: tuple[int, int, int], seed: int) -> None:
    batch, n, _ = shape
    inputs = draw(seed, shape, (batch, n))
    reduce = partial(method, r=n // 2)
    assert_same_bits_alone(reduce, *inputs)
    assert_fp32_inside(reduce, *inputs)
    assert_nothing_read(reduce, *inputs)


@pytest.mark.parametrize("r", [-1, 5])
def test_one_token_has_to_stay(r: int) -> None:
    with pytest.raises(ValueError, match="0 to 4 can"):
        illava(torch.ones(1, 5, 1), torch.ones(1, 5), r)


def test_counts_in_the_decoder_are_rounded_half_to_even() -> None:
    assert [IllavaDecoder().removed(n, 0.5) for n in (9, 11, 576)] == [4, 6, 288]  # 4.5 and 5.5
    assert [FastV().removed(n, 0.5) for n in (9, 11, 576)] == [5, 5, 288]  # what is kept is rounded
