"""ToMe and Turbo."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from foldserve.reducers.fold import Reduced
from foldserve.reducers.schedule import even_schedule
from foldserve.reducers.tome import tome, turbo
from tests.reducers.check import (
    assert_fp32_inside,
    assert_nothing_read,
    assert_partition,
    assert_same_bits_alone,
    draw,
    few,
)
from tests.reducers.naive import naive_tome

shapes = st.tuples(st.integers(1, 3), st.integers(2, 40), st.integers(2, 9))
kinds = st.sampled_from(["tome", "tome_cls", "turbo"])


def run(kind: str, r: int, x: Tensor, keys: Tensor, sizes: Tensor, attention: Tensor) -> Reduced:
    if kind == "turbo":
        return turbo(x, keys, attention, sizes, r)
    return tome(x, keys, sizes, r, class_token=kind == "tome_cls")


def inputs(shape: tuple[int, int, int], seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Tokens, keys, sizes of 1 to 4, attention."""
    batch, n, _ = shape
    x, keys, attention = draw(seed, shape, (batch, n, 6), (batch, n), dtype=dtype)
    sizes = torch.randint(1, 5, (batch, n), generator=torch.Generator().manual_seed(seed))
    return [x, keys, sizes, attention.softmax(dim=-1)]


@few
@given(kinds, shapes, st.data(), st.integers(0, 2**31))
def test_same_as_written_token_by_token(kind: str, shape: tuple[int, int, int], data: st.DataObject, seed: int) -> None:
    batch, n, _ = shape
    class_token = kind != "tome"
    most = (n - class_token) // 2
    assume(most > 0)
    r = data.draw(st.integers(1, most))
    x, keys, sizes, attention = inputs(shape, seed, torch.float64)
    reduced = run(kind, r, x, keys, sizes, attention)
    assert_partition(reduced, n, n - r, own_sizes=sizes)
    for i in range(batch):
        of_image = attention[i] if kind == "turbo" else None
        tokens = naive_tome(x[i], keys[i], sizes[i], r, class_token=class_token, attention=of_image)
        assert reduced.source[i].tolist() == [token.members[0] for token in tokens]
        assert reduced.sizes[i].tolist() == [len(token.members) for token in tokens]
        torch.testing.assert_close(reduced.tokens[i], torch.stack([token.value for token in tokens]))
        if class_token:
            assert torch.equal(reduced.tokens[i, 0], x[i, 0])


@few
@given(kinds, shapes, st.integers(0, 2**31))
def test_one_image_does_not_feel_the_others(kind: str, shape: tuple[int, int, int], seed: int) -> None:
    r = (shape[1] - 1) // 2
    assume(r > 0)

    def reduce(*given: Tensor) -> Reduced:
        return run(kind, r, *given)

    assert_same_bits_alone(reduce, *inputs(shape, seed))
    assert_fp32_inside(reduce, *inputs(shape, seed))
    assert_nothing_read(reduce, *inputs(shape, seed))


@pytest.mark.parametrize(("n", "class_token", "most"), [(8, False, 4), (9, False, 4), (8, True, 3), (9, True, 4)])
def test_half_of_the_patches_can_go(n: int, class_token: bool, most: int) -> None:
    x, keys, sizes, _ = inputs((1, n, 4), 0)
    assert tome(x, keys, sizes, most, class_token=class_token).tokens.shape[1] == n - most
    with pytest.raises(ValueError, match=f"1 to {most} of them"):
        tome(x, keys, sizes, most + 1, class_token=class_token)


@few
@given(st.integers(0, 3000), st.integers(1, 48))
def test_even_schedule(removed: int, layers: int) -> None:
    schedule = even_schedule(removed, layers)
    assert (sum(schedule), len(schedule)) == (removed, layers)
    assert max(schedule) - min(schedule) <= 1
    assert list(schedule) == sorted(schedule, reverse=True)
