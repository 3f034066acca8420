"""Methods after the projector see its output, whole; the others still leave it less to project."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from foldserve.reducers.fold import Reduced
from foldserve.reducers.method import ONLY_TOKENS, AfterProjector, AfterTower, Seen
from foldserve.reducers.random import keep
from foldserve.server.engine.families.mmvp import MmvpFamily
from foldserve.server.engine.vision import Survivors, project_together, reduce_features

KEPT = torch.tensor([1, 3])


class _Before(AfterTower):
    def reduce(self, x: Tensor, plan: Any, width: int | None = None) -> Reduced:
        return keep(x, KEPT)


class _After(AfterProjector):
    """Notes what it sees."""

    def __init__(self) -> None:
        self.given: list[tuple[Tensor, Seen]] = []

    def reduce(self, x: Tensor, plan: Any, width: int | None = None, seen: Seen = ONLY_TOKENS) -> Reduced:
        self.given.append((x, seen))
        return keep(x, KEPT)


class _Both(_After):
    needs_tower = needs_queries = True


class _Plan:
    def __init__(self, reducer: AfterTower | None) -> None:
        self.reducer = reducer


@pytest.mark.parametrize("kind", [_After, _Both])
def test_what_a_method_sees(kind: type[_After]) -> None:
    """Projected tokens of its own images alone, and what it asks for."""
    torch.manual_seed(0)
    images = [torch.randn(4, 3) for _ in range(4)]
    queries = [torch.randn(length, 6) for length in (2, 5, 0, 1)]
    method, weight, projected = kind(), torch.randn(3, 6), []
    own, plain, before = _Plan(method), _Plan(None), _Plan(_Before())

    def project(features: Sequence[Tensor]) -> Sequence[Tensor]:
        projected.append([len(each) for each in features])
        return project_together(lambda x: x @ weight, features)

    whole = [Survivors(image, torch.arange(4)) for image in images]
    plans: Any = [before, own, plain, own]
    left = reduce_features(whole, plans, project, queries=queries)

    assert sorted(projected) == [[2, 4], [4, 4]]
    for image, survivor, plan in zip(images, left, plans, strict=True):
        source = torch.arange(4) if plan is plain else KEPT
        assert torch.equal(survivor.source, source)
        torch.testing.assert_close(survivor.features, (image @ weight)[source])
    ((x, seen),) = method.given
    torch.testing.assert_close(x, torch.stack([images[1], images[3]]) @ weight)
    if kind is _After:
        assert seen == ONLY_TOKENS
        return
    assert seen.tower is not None and seen.queries is not None
    assert torch.equal(seen.tower, torch.stack([images[1], images[3]]))
    assert [query is queries[i] for query, i in zip(seen.queries, (1, 3), strict=True)] == [True, True]


def test_a_family_may_give_the_towers_features_itself() -> None:
    """One whose tower projects: what entered its merger."""
    method, merged = _Both(), torch.randn(2, 4, 3)
    whole = [Survivors(torch.randn(4, 5), torch.arange(4)) for _ in range(2)]
    plan: Any = _Plan(method)
    reduce_features(whole, [plan] * 2, tower=list(merged), queries=[torch.zeros(0, 5)] * 2)
    ((_, seen),) = method.given
    assert seen.tower is not None and torch.equal(seen.tower, merged)


def test_each_tower_of_mmvp_has_its_own_projector() -> None:
    model = SimpleNamespace(multi_modal_projector=SimpleNamespace(clip=lambda x: x + 1, dino=lambda x: x - 1))
    grids = [torch.full((2, 3), value) for value in (10.0, 20.0, 30.0, 40.0)]
    projected = MmvpFamily.project(Any, model, grids)  # type: ignore[arg-type]
    assert [grid[0, 0].item() for grid in projected] == [11, 19, 31, 39]
