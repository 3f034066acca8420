"""PruMerge with a fixed count."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from foldserve.reducers.fold import Reduced
from foldserve.reducers.prumerge import most_attended, prumerge
from tests.reducers.check import (
    assert_fp32_inside,
    assert_nothing_read,
    assert_partition,
    assert_same_bits_alone,
    draw,
    few,
)
from tests.reducers.naive import naive_prumerge


def run(count: int, x: Tensor, attention: Tensor, keys: Tensor) -> Reduced:
    selected = most_attended(attention, count)
    normal = F.normalize(keys, dim=-1)
    chosen = normal.gather(1, selected.unsqueeze(-1).expand(-1, -1, keys.shape[-1]))
    return prumerge(x, attention, selected, chosen @ normal.mT)


@st.composite
def images(draw_: st.DrawFn, dtype: torch.dtype = torch.float32) -> tuple[int, list[Tensor]]:
    """A count, and tokens, attention, keys: more than 33 tokens, or fewer."""
    batch, n = draw_(st.integers(1, 3)), draw_(st.integers(2, 50))
    x, attention, keys = draw(draw_(st.integers(0, 2**31)), (batch, n, 5), (batch, n), (batch, n, 6), dtype=dtype)
    return draw_(st.integers(1, n - 1)), [x, attention.softmax(dim=-1), keys]


@few
@given(images(torch.float64))
def test_same_as_written_token_by_token(image: tuple[int, list[Tensor]]) -> None:
    count, (x, attention, keys) = image
    reduced = run(count, x, attention, keys)
    assert_partition(reduced, x.shape[1], count + 1)
    for i in range(len(x)):
        selected, tokens = naive_prumerge(x[i], attention[i], keys[i], count)
        assert reduced.source[i, :-1].tolist() == selected
        torch.testing.assert_close(reduced.tokens[i], torch.stack(tokens))
        rest = [j for j in range(x.shape[1]) if j not in selected]
        assert reduced.source[i, -1] == max(rest, key=lambda j: float(attention[i, j]))


@few
@given(images())
def test_one_image_does_not_feel_the_others(image: tuple[int, list[Tensor]]) -> None:
    count, tensors = image

    def reduce(*given: Tensor) -> Reduced:
        return run(count, *given)

    assert_same_bits_alone(reduce, *tensors)
    assert_fp32_inside(reduce, *tensors)
    assert_nothing_read(reduce, *tensors)
