"""The reduction benchmark's own logic, on tiny towers; nothing here is asserted about time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from foldserve.loadtest.micro.reducers import PROJECTION, TOWERS, TowerShape, least_flops, measure, render
from foldserve.reducers import METHODS
from foldserve.reducers.method import AcrossFrames, InDecoder, InProjector, Preselection

TINY = TowerShape("tiny", 6, 1, 9, 32, 32, 2, 2, class_token=True)


@pytest.mark.parametrize("tower", [TINY, replace(TINY, class_token=False), replace(TINY, tiles=5)], ids=str)
def test_every_method_that_works_on_a_tower_is_timed(tower: TowerShape) -> None:
    rows = measure(tower, "fp32", ratios=(0.5, 0.75), rounds=1, device="cpu")
    others = AcrossFrames | Preselection | InDecoder | InProjector
    before_the_decoder = {name for name, method in METHODS.items() if not isinstance(method, others)}
    left_out = set() if tower.class_token else {"folder_cls", "turbo", "prumerge"}
    assert {row.method for row in rows} == {PROJECTION} | before_the_decoder - left_out
    n = 36 * tower.tiles
    assert {row.tokens for row in rows} == {n}
    assert {row.kept for row in rows if row.method == "pool"} == {n // 4, n // 9}
    assert {row.kept for row in rows if row.method in ("folder", "illava", "tome")} == {n // 2, n // 4}
    assert all(row.encoder_ms > 0 and row.reduction_ms.value >= 0 for row in rows)
    assert all(render(row).count("|") == 7 for row in rows)


def test_published_towers() -> None:
    assert list(TOWERS) == [576, 729, 2880, 8748]


def test_least_flops() -> None:
    """Of 36 tokens, 32 wide before the projector and 64 behind it; a product is two operations."""
    tower = replace(TINY, embedding=64)
    pairs = 36 * 36 // 2
    assert least_flops("divprune", tower, 9) == 2 * pairs * 64
    assert least_flops("cdpruner", tower, 36) == 2 * pairs * 64 + 36**3
    assert least_flops("mmtok", tower, 9) == 2 * pairs * 32 + 2 * 36 * 8 * 64
    assert least_flops("folder", tower, 9) == 2 * 18 * 18 * 32
    assert least_flops(PROJECTION, tower, 9) == 2 * 27 * (32 * 64 + 64 * 64)
    assert least_flops("random", tower, 9) == 0
