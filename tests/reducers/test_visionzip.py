"""VisionZip: what is kept, and what is merged into what."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foldserve.reducers import method_with_options
from foldserve.reducers.attention import LayerAttention
from foldserve.reducers.fold import Reduced
from foldserve.reducers.plan import Reduction, VisionGeometry, make_plan
from foldserve.reducers.visionzip import VisionZip, visionzip
from tests.reducers.check import (
    assert_fp32_inside,
    assert_nothing_read,
    assert_partition,
    assert_same_bits_alone,
    draw,
    few,
)
from tests.reducers.naive import naive_visionzip


@st.composite
def images(draw_: st.DrawFn, dtype: torch.dtype = torch.float32) -> tuple[int, int, list[Tensor]]:
    """Dominant and contextual tokens; tokens, attention and keys."""
    batch, n = draw_(st.integers(1, 3)), draw_(st.integers(2, 50))
    dominant = draw_(st.integers(1, n - 1))
    contextual = draw_(st.integers(0, n - dominant))
    shapes = (batch, n, 5), (batch, n), (batch, n, 6)
    return dominant, contextual, draw(draw_(st.integers(0, 2**31)), *shapes, dtype=dtype)


@few
@given(images(torch.float64))
def test_same_as_written_token_by_token(image: tuple[int, int, list[Tensor]]) -> None:
    dominant, contextual, (x, score, keys) = image
    reduced = visionzip(x, score, keys, dominant, contextual)
    for i in range(len(x)):
        members, tokens = naive_visionzip(x[i], score[i], keys[i], dominant, contextual)
        assert reduced.source[i].tolist() == [own for own, *_ in members]
        assert reduced.sizes[i].tolist() == [len(each) for each in members]
        slots = {token: slot for slot, each in enumerate(members) for token in each}
        assert reduced.group[i].tolist() == [slots.get(token, -1) for token in range(x.shape[1])]
        torch.testing.assert_close(reduced.tokens[i], torch.stack(tokens))
    if contextual:
        assert_partition(reduced, x.shape[1], dominant + contextual)


@few
@given(images())
def test_one_image_does_not_feel_the_others(image: tuple[int, int, list[Tensor]]) -> None:
    dominant, contextual, tensors = image

    def reduce(*given: Tensor) -> Reduced:
        x, score, keys = given
        return visionzip(x, score, keys, dominant, contextual)

    assert_same_bits_alone(reduce, *tensors)
    assert_fp32_inside(reduce, *tensors)
    assert_nothing_read(reduce, *tensors)


def test_a_target_and_the_mean_of_those_that_came() -> None:
    """Tokens 1 and 4 are kept. Of the rest 0 and 3 are targets: 2 and 5 go to 0, nobody to 3."""
    x = torch.tensor([1.0, 10, 100, 1000, 10000, 300])[None, :, None]
    score = torch.tensor([[0.1, 0.9, 0.2, 0.3, 0.8, 0.4]])
    keys = torch.tensor([[1.0, 0], [0, 0], [1, 0.1], [0, 1], [0, 0], [9, 1]])[None]
    tokens, sizes, source, group = visionzip(x, score, keys, 2, 2)
    assert tokens.flatten().tolist() == [10, 10000, 1 + (100 + 300) / 2, 1000]
    assert (source.tolist(), sizes.tolist()) == ([[1, 4, 0, 3]], [[1, 1, 3, 1]])
    assert group.tolist() == [[2, 0, 2, 3, 1, 2]]


@pytest.mark.parametrize("contextual", [0, 1, 6])
def test_an_image_of_one_colour(contextual: int) -> None:
    """Of equals the first stay, and the first target takes up all."""
    x, kept = torch.full((1, 40, 3), 2.0), 8
    reduced = visionzip(x, torch.ones(1, 40), torch.ones(1, 40, 4), kept, contextual)
    assert reduced.source[0].tolist() == [*range(kept), *range(kept, 40, 32 // max(1, contextual))][: kept + contextual]
    expected = [2.0] * kept + [4.0] * min(contextual, 1) + [2.0] * max(0, contextual - 1)
    torch.testing.assert_close(reduced.tokens[0, :, 0], torch.tensor(expected))


def test_without_contextual_tokens_the_others_are_dropped() -> None:
    (x, score, keys) = draw(0, (2, 20, 3), (2, 20), (2, 20, 4))
    reduced = visionzip(x, score, keys, 6, 0)
    assert (reduced.group < 0).sum(dim=1).tolist() == [14, 14]
    assert torch.equal(reduced.tokens, x.gather(1, reduced.source[..., None].expand(-1, -1, 3)))


def test_more_contextual_tokens_than_others() -> None:
    x, score, keys = draw(0, (1, 20, 3), (1, 20), (1, 20, 4))
    with pytest.raises(ValueError, match="14 tokens cannot be merged into 15"):
        visionzip(x, score, keys, 6, 15)


@pytest.mark.parametrize("in_prompt", [True, False])
@pytest.mark.parametrize("kept", [2, 6, 7, 64, 143])
def test_with_the_class_token_and_without_it(in_prompt: bool, kept: int) -> None:
    """It is first, as it was; a patch more is kept where it stays out."""
    geometry = VisionGeometry(144, (12, 12), 3, class_token=True)
    plan = make_plan(Reduction("visionzip", options=(("class_token", in_prompt),), keep_tokens=kept), geometry)
    method = method_with_options(plan.method, plan.options)
    assert isinstance(method, VisionZip)
    x, query, key = draw(kept, (2, 145, 8), (2, 145, 2, 4), (2, 145, 2, 4))
    attention = LayerAttention(query, key, 0.5, class_token=True)
    reduced = method.reduce(x, torch.ones(2, 145, dtype=torch.int64), attention, plan.folds, plan)
    assert reduced.tokens.shape == (2, kept, 8)
    assert (reduced.source[:, 0] == 0).all() == in_prompt
    assert torch.equal(reduced.tokens[:, 0], x[:, 0]) == in_prompt
    assert (reduced.group[:, 0] >= 0).all() == in_prompt
    members = reduced.group.clamp_min(0).eq(torch.arange(kept)[:, None, None]) & (reduced.group >= 0)
    assert torch.equal(members.sum(dim=2).mT, reduced.sizes)
