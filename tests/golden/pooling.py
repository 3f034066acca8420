"""Checks of `reducers/pool.py`, and of its windows against the concatenation that LLaVA-STF starts with."""

from __future__ import annotations

from math import isqrt

from foldserve.reducers.pool import pool, windows
from foldserve.reducers.stf import space_to_depth
from tests.golden.case import Case, assert_close, assert_equal


def check_pooling(case: Case) -> None:
    """Mean of each window, and its tokens side by side in both orders."""
    inputs, golden, k = case.read(case.inputs), case.read(case.outputs), case.params["k"]
    side = isqrt(case.params["n"])
    assert_close("avgpool", pool(inputs["x"], (side, side), (k, k)).tokens, golden["avgpool"])
    spatial = windows(inputs["x"], (side, side), (k, k)).flatten(2)
    assert_equal("tokenconcat_spatial_major", spatial, golden["tokenconcat_spatial_major"])
    assert_equal("tokenconcat_channel_major", space_to_depth(inputs["x"], k), golden["tokenconcat_channel_major"])
