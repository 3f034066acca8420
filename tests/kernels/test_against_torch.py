"""Each kernel gives what its torch reference gives, whatever the sizes, dtypes, strides, ties and NaNs."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foldserve.kernels import checks
from foldserve.kernels.checks import CHECKS, Check, name_of
from foldserve.reducers.fold import Order
from tests.kernels.conftest import Run

ANY = {
    "dtype": st.sampled_from((torch.bfloat16, torch.float16, torch.float32)),
    "layout": st.sampled_from(get_args(checks.Layout)),
}
some_examples = settings(max_examples=15, deadline=None)


@pytest.mark.parametrize(("check", "args"), CHECKS, ids=[name_of(*each) for each in CHECKS])
def test_check(run: Run, check: Check, args: tuple[Any, ...]) -> None:
    run(check, *args)


@some_examples
@given(n=st.integers(2, 300), **ANY)
def test_match_of_any_size(run: Run, n: int, dtype: torch.dtype, layout: str) -> None:
    run(checks.check_match, n, 16, dtype, "few", layout)


@some_examples
@given(n=st.integers(2, 300), order=st.sampled_from(get_args(Order)), values=st.sampled_from(get_args(checks.Values)))
def test_place_of_any_size(run: Run, n: int, order: str, values: str) -> None:
    run(checks.check_place, n, order, values)


@some_examples
@given(n=st.integers(1, 60), width=st.integers(1, 40), share=st.floats(0, 1), **ANY)
def test_groups_of_any_size(run: Run, n: int, width: int, share: float, dtype: torch.dtype, layout: str) -> None:
    run(checks.check_groups, n, width, max(1, round(share * n)), dtype, layout)


def test_a_check_can_fail(run: Run) -> None:
    with pytest.raises(AssertionError):
        run(checks.check_wrong_twin)
