"""Each kernel gives what its torch reference gives, whatever the sizes, dtypes, strides, ties and NaNs."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foldserve.reducers.fold import Order
from tests.kernels import checks
from tests.kernels.conftest import Run

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ANY = {"dtype": st.sampled_from((BF16, FP16, FP32)), "layout": st.sampled_from(get_args(checks.Layout))}
some_examples = settings(max_examples=15, deadline=None)


@pytest.mark.parametrize(
    ("n", "width", "dtype", "values", "layout"),
    [
        (2, 1, FP32, "random", "contiguous"),
        (3, 5, FP32, "random", "sliced"),
        (16, 16, BF16, "few", "contiguous"),
        (33, 16, FP16, "few", "transposed"),
        (130, 16, FP32, "few", "sliced"),  # the last tile of odd tokens has one
        (259, 16, BF16, "few", "contiguous"),  # equal ones in several tiles
        (64, 72, FP32, "random", "transposed"),
        (65, 72, BF16, "random", "sliced"),
        (130, 65, FP16, "random", "contiguous"),
        (37, 7, FP32, "nan", "contiguous"),
        (131, 33, BF16, "nan", "sliced"),
        (729, 16, BF16, "few", "contiguous"),
    ],
    ids=str,
)
def test_match(run: Run, n: int, width: int, dtype: torch.dtype, values: str, layout: str) -> None:
    run(checks.check_match, n, width, dtype, values, layout)


@some_examples
@given(n=st.integers(2, 300), **ANY)
def test_match_of_any_size(run: Run, n: int, dtype: torch.dtype, layout: str) -> None:
    run(checks.check_match, n, 16, dtype, "few", layout)


@pytest.mark.parametrize("order", get_args(Order))
@pytest.mark.parametrize(
    ("n", "values"),
    [(2, "few"), (3, "few"), (5, "random"), (64, "few"), (65, "nan"), (144, "random"), (577, "few"), (1024, "random")],
    ids=str,
)
def test_place(run: Run, n: int, order: str, values: str) -> None:
    run(checks.check_place, n, order, values)


@some_examples
@given(n=st.integers(2, 300), order=st.sampled_from(get_args(Order)), values=st.sampled_from(get_args(checks.Values)))
def test_place_of_any_size(run: Run, n: int, order: str, values: str) -> None:
    run(checks.check_place, n, order, values)


@pytest.mark.parametrize("n", [1025, 2880])
def test_more_tokens_than_a_program_ranks_are_left_to_torch(run: Run, n: int) -> None:
    run(checks.check_bound, n)


@pytest.mark.parametrize(
    ("n", "values"),
    [(1, "few"), (2, "random"), (3, "few"), (31, "nan"), (32, "random"), (33, "few"), (145, "nan"), (1024, "random")],
    ids=str,
)
def test_lowest_into_one(run: Run, n: int, values: str) -> None:
    run(checks.check_lowest_into_one, n, values)


@pytest.mark.parametrize(
    ("n", "width", "kept", "dtype", "layout"),
    [
        (1, 1, 1, FP32, "contiguous"),
        (2, 3, 2, BF16, "contiguous"),
        (65, 129, 3, FP32, "sliced"),
        (64, 16, 9, BF16, "transposed"),
        (131, 40, 1, FP16, "sliced"),  # a flat image: all in one
        (300, 257, 2, BF16, "contiguous"),
    ],
    ids=str,
)
def test_groups(run: Run, n: int, width: int, kept: int, dtype: torch.dtype, layout: str) -> None:
    run(checks.check_groups, n, width, kept, dtype, layout)


@some_examples
@given(n=st.integers(1, 60), width=st.integers(1, 40), share=st.floats(0, 1), **ANY)
def test_groups_of_any_size(run: Run, n: int, width: int, share: float, dtype: torch.dtype, layout: str) -> None:
    run(checks.check_groups, n, width, max(1, round(share * n)), dtype, layout)


@pytest.mark.parametrize(
    ("count", "size", "block_size"), [(1, 1, 16), (3, 8, 32), (0, 5, 16), (255, 257, 16), (729, 729, 24)], ids=str
)
def test_kv_slots(run: Run, count: int, size: int, block_size: int) -> None:
    run(checks.check_slots, count, size, block_size)


@pytest.mark.parametrize("method", get_args(checks.Method))
def test_whole_methods(run: Run, method: str) -> None:
    run(checks.check_method, method, 37, BF16 if method in ("folder", "illava") else FP32)


def test_a_check_can_fail(run: Run) -> None:
    with pytest.raises(AssertionError):
        run(checks.check_wrong_twin)


def test_what_kernels_refuse(run: Run) -> None:
    run(checks.check_refusals)
