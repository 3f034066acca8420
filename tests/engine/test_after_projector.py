"""Methods after the projector see its output, whole; the others still leave it less to project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from vllm.lora.layers import VocabParallelEmbeddingWithLoRA

from foldserve.reducers.fold import Reduced, keep
from foldserve.reducers.geometry import VisionGeometry
from foldserve.reducers.item import ItemPlan, Layout, Part, plan_item
from foldserve.reducers.method import NO_SIDE_INPUTS, AfterProjector, AfterTower, SideInputs
from foldserve.reducers.reduction import Reduction
from foldserve.server.engine.families.mmvp import MmvpFamily
from foldserve.server.engine.families.video_llava import VideoLlavaFamily
from foldserve.server.engine.families.video_llava_model import VIDEO
from foldserve.server.engine.family import AfterTowerFamily
from foldserve.server.engine.model import FoldModel
from foldserve.server.engine.vision import KeptTokens, project_together, reduce_features
from tests.reducers.naive import naive_mmtok

KEPT = torch.tensor([1, 3])


class _Before(AfterTower):
    def reduce(self, x: Tensor, plan: Any, width: int | None = None) -> Reduced:
        return keep(x, KEPT)


class _After(AfterProjector):
    """Notes what it sees."""

    def __init__(self) -> None:
        self.given: list[tuple[Tensor, SideInputs]] = []

    def reduce(self, x: Tensor, plan: Any, width: int | None = None, side: SideInputs = NO_SIDE_INPUTS) -> Reduced:
        self.given.append((x, side))
        return keep(x, KEPT)


class _Both(_After):
    needs_tower = takes_query = True


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

    whole = [KeptTokens(image, torch.arange(4)) for image in images]
    plans: Any = [before, own, plain, own]
    left = reduce_features(whole, plans, project, queries=queries)

    assert sorted(projected) == [[2, 4], [4, 4]]
    for image, survivor, plan in zip(images, left, plans, strict=True):
        source = torch.arange(4) if plan is plain else KEPT
        assert torch.equal(survivor.source, source)
        torch.testing.assert_close(survivor.features, (image @ weight)[source])
    ((x, side),) = method.given
    torch.testing.assert_close(x, torch.stack([images[1], images[3]]) @ weight)
    if kind is _After:
        assert side == NO_SIDE_INPUTS
        return
    assert side.tower is not None and side.queries is not None
    assert torch.equal(side.tower, torch.stack([images[1], images[3]]))
    assert [query is queries[i] for query, i in zip(side.queries, (1, 3), strict=True)] == [True, True]


def test_a_family_may_give_the_towers_features_itself() -> None:
    """One whose tower projects: what entered its merger."""
    method, merged = _Both(), torch.randn(2, 4, 3)
    whole = [KeptTokens(torch.randn(4, 5), torch.arange(4)) for _ in range(2)]
    plan: Any = _Plan(method)
    reduce_features(whole, [plan] * 2, tower=list(merged), queries=[torch.zeros(0, 5)] * 2)
    ((_, side),) = method.given
    assert side.tower is not None and torch.equal(side.tower, merged)


class _TwoParts(AfterTowerFamily):
    """A grid of 12 tokens, and two of 9."""

    def __init__(self, weight: Tensor) -> None:
        self.largest = Layout((Part(of_grid(12)), Part(of_grid(9), count=2)))
        self._weight = weight

    @classmethod
    def of(cls, model_config: Any) -> None:
        raise NotImplementedError

    def grids(self, model: Any, inputs: Mapping[str, Any], plans: Sequence[ItemPlan]) -> list[list[Tensor]]:
        return [list(parts) for parts in inputs["parts"]]

    def project(self, model: Any, features: Sequence[Tensor]) -> Sequence[Tensor]:
        return project_together(lambda x: x @ self._weight, features)

    def pack(self, model: Any, grids: Sequence[KeptTokens], plan: ItemPlan) -> KeptTokens:
        return KeptTokens(torch.cat([grid.features for grid in grids]), torch.cat([grid.source for grid in grids]))


class _LosesToken(_TwoParts):
    def pack(self, model: Any, grids: Sequence[KeptTokens], plan: ItemPlan) -> KeptTokens:
        return super().pack(model, [grids[0], *(grid._replace(features=grid.features[1:]) for grid in grids[1:])], plan)


def test_a_family_that_packs_other_counts_than_it_plans() -> None:
    family = _LosesToken(torch.randn(5, 8))
    plan = plan_item(Reduction.parse({"ratio": 0.5}), family.largest)
    parts = [(torch.randn(1, 12, 5), torch.randn(2, 9, 5))]
    with pytest.raises(RuntimeError, match=r"\[16\] embeddings were planned by the family's `layout`, .* made \[14\]"):
        FoldModel._encode(cast(Any, None), family, {"parts": parts}, [plan])


def of_grid(tokens: int) -> VisionGeometry:
    return VisionGeometry(tokens, shows_tower=True)


@pytest.mark.parametrize("lengths", [(3, 0), (2, 4), ()])
def test_every_grid_of_an_image_is_chosen_from_by_its_query(lengths: tuple[int, ...]) -> None:
    """As LLaVA-NeXT's base tile and mosaic are, MMVP's two towers, a video's frames."""
    torch.manual_seed(0)
    family = _TwoParts(torch.randn(5, 8))
    parts = [(torch.randn(1, 12, 5), torch.randn(2, 9, 5)) for _ in range(2)]
    queries = [torch.randn(length, 8) for length in lengths]
    plan = plan_item(Reduction.parse({"method": "mmtok", "ratio": 0.5}), family.largest)
    left = family.encode(None, {"parts": parts}, [plan] * 2, queries)
    for i, (own, survivors) in enumerate(zip(parts, left, strict=True)):
        text = queries[i] if queries else torch.zeros(0, 8)
        grids = [own[0][0], *own[1]]
        projected = [grid @ family._weight for grid in grids]
        picks = [
            naive_mmtok(after, grid, text, kept, 0.02)
            for after, grid, kept in zip(projected, grids, (6, 5, 5), strict=True)
        ]
        assert survivors.source.tolist() == [*chain(*picks)]
        wanted = torch.cat([after[own_picks] for after, own_picks in zip(projected, picks, strict=True)])
        torch.testing.assert_close(survivors.features, wanted)


def test_frames_of_video_llava_are_chosen_from_by_the_videos_query() -> None:
    torch.manual_seed(0)
    frames, weight = torch.randn(5, 10, 6), torch.randn(6, 8)
    model = SimpleNamespace(frame_features=lambda pixels: frames, multi_modal_projector=lambda x: x @ weight)
    family = VideoLlavaFamily(VisionGeometry(9, (3, 3), shows_tower=True), trained_frames=8)
    asked = Reduction.parse({"method": "mmtok", "ratio": 0.5})
    plans = [plan_item(asked, family.layout((count,))) for count in (2, 3)]
    queries = [torch.randn(2, 8), torch.randn(4, 8)]
    left = family.encode(model, {VIDEO: None}, plans, queries)
    kept = torch.cat([video.source for video in left]).view(5, 6)
    for frame, places, query in zip(frames, kept, [queries[0]] * 2 + [queries[1]] * 3, strict=True):
        picks = naive_mmtok(frame[1:] @ weight, frame[1:], query, 5, 0.02)
        assert (places - places[0]).tolist() == [0, *(pick + 1 for pick in picks)]


class _Adapted(VocabParallelEmbeddingWithLoRA):
    def __init__(self, base_layer: nn.Module) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("goes by the tokens of a step")


@pytest.mark.parametrize("adapted", [False, True])
def test_queries_are_looked_up_in_the_models_own_table(adapted: bool) -> None:
    table = nn.Embedding(9, 4)
    decoder = nn.Module()
    decoder.embed_tokens = _Adapted(table) if adapted else table
    decoder.embed_input_ids = decoder.embed_tokens
    model = SimpleNamespace(get_language_model=lambda: decoder)
    model._lookup = FoldModel._lookup.func(model)  # type: ignore[attr-defined]
    ids = [torch.tensor([3, 1]), torch.tensor([], dtype=torch.int64), torch.tensor([8])]
    found = FoldModel._query_embeds(model, ids)  # type: ignore[arg-type]
    assert [torch.equal(own, table.weight[each]) for own, each in zip(found, ids, strict=True)] == [True] * 3
    assert FoldModel._query_embeds(model, None) == []  # type: ignore[arg-type]


def test_each_tower_of_mmvp_has_its_own_projector() -> None:
    model = SimpleNamespace(multi_modal_projector=SimpleNamespace(clip=lambda x: x + 1, dino=lambda x: x - 1))
    grids = [torch.full((2, 3), value) for value in (10.0, 20.0, 30.0, 40.0)]
    projected = MmvpFamily.project(Any, model, grids)  # type: ignore[arg-type]
    assert [grid[0, 0].item() for grid in projected] == [11, 19, 31, 39]
