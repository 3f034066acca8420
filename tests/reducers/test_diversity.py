"""DivPrune and CDPruner: picks against the definitions, and images whose tokens are all alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foldserve.reducers import cosines, fold
from foldserve.reducers.cdpruner import cdpruner, largest_volume
from foldserve.reducers.divprune import Geometry, divprune, farthest
from foldserve.reducers.fold import Reduced, unit_rows
from foldserve.reducers.plan import InvalidReduction, Reduction, VisionGeometry, make_plan
from tests.reducers.check import (
    assert_fp32_inside,
    assert_nothing_read,
    assert_partition,
    assert_same_bits_alone,
    draw,
    few,
)
from tests.reducers.naive import naive_cdpruner, naive_divprune

GEOMETRIES: tuple[Geometry, ...] = ("plain", "centered", "standardized")
METHODS: dict[str, Callable[[Tensor, int], Reduced]] = {
    **{geometry: partial(divprune, geometry=geometry) for geometry in GEOMETRIES},
    "merge": partial(divprune, rest="merge"),
    "centered merge": partial(divprune, geometry="centered", rest="merge"),
    "cdpruner": cdpruner,
}


@st.composite
def images(draw_: st.DrawFn, dtype: torch.dtype = torch.float32, least: int = 2) -> tuple[int, Tensor]:
    batch, n = draw_(st.integers(1, 3)), draw_(st.integers(least, 40))
    (x,) = draw(draw_(st.integers(0, 2**31)), (batch, n, 24), dtype=dtype)
    return draw_(st.integers(1, n)), x + draw_(st.sampled_from([0, 1]))


@few
@given(images(torch.float64), st.sampled_from(GEOMETRIES))
def test_divprune_is_what_its_papers_say(image: tuple[int, Tensor], geometry: Geometry) -> None:
    kept, x = image
    source = divprune(x, kept, geometry=geometry).source
    for own, tokens in zip(x, source, strict=True):
        assert tokens.tolist() == sorted(naive_divprune(own, kept, geometry))


@few
@given(images(torch.float64), st.integers(0, 2**31))
def test_cdpruner_is_what_its_paper_says(image: tuple[int, Tensor], seed: int) -> None:
    kept, x = image
    kept = min(kept, 12)
    relevance = 0.5 + draw(seed, x.shape[:2], dtype=torch.float64)[0].sigmoid()
    picks = largest_volume(unit_rows(x), kept, relevance)
    for own, fits, tokens in zip(x, relevance, picks, strict=True):
        assert tokens.tolist() == naive_cdpruner(own, kept, fits)


@few
@given(images(), st.sampled_from([*METHODS]))
def test_one_image_does_not_feel_the_others(image: tuple[int, Tensor], method: str) -> None:
    kept, x = image

    def reduce(x: Tensor) -> Reduced:
        return METHODS[method](x, kept)

    assert_same_bits_alone(reduce, x)
    assert_fp32_inside(reduce, x)
    assert_nothing_read(reduce, x)


@few
@given(images(), st.permutations(range(3)))
def test_images_in_another_order(image: tuple[int, Tensor], order: list[int]) -> None:
    kept, x = image
    order = [i for i in order if i < len(x)]
    for reduce in METHODS.values():
        assert all(map(torch.equal, reduce(x[order], kept), (each[order] for each in reduce(x, kept))))


def degenerate(kind: str) -> Tensor:
    """(2, 33, 16)"""
    (x,) = draw(3, (2, 33, 16))
    if kind == "one vector":
        return x[:, :1].expand_as(x).clone()
    if kind == "zeros":
        return torch.zeros_like(x)
    if kind == "some zeros":
        return x.index_fill(1, torch.tensor([0, 5, 6, 32]), 0)
    if kind == "two vectors":
        return x[:, :2].repeat(1, 17, 1)[:, :33]
    if kind == "scaled":
        return x[:, :1] * torch.arange(1, 34).view(1, -1, 1)
    if kind == "not a number":
        return x.index_fill(1, torch.tensor([4, 20]), torch.nan)
    return x[:, torch.arange(33) % 7]  # "seven vectors"


KINDS = ("one vector", "zeros", "some zeros", "two vectors", "seven vectors", "scaled", "not a number")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_as_many_different_tokens_as_asked_for(method: str, kind: str) -> None:
    x = degenerate(kind)
    for kept in (1, 2, 9, 32, 33):
        reduced = METHODS[method](x, kept)
        assert reduced.source.shape == (2, kept)
        assert (reduced.source.diff(dim=1) > 0).all() and (reduced.source >= 0).all() and (reduced.source < 33).all()
        if "merge" in method:
            assert_partition(reduced, 33, kept)


@pytest.mark.parametrize("kind", ["one vector", "zeros"])
@pytest.mark.parametrize("method", ["plain", "centered", "standardized", "cdpruner"])
def test_of_equals_the_first(method: str, kind: str) -> None:
    assert METHODS[method](degenerate(kind), 9).source.tolist() == [[*range(9)]] * 2


def test_each_vector_once_before_any_comes_again() -> None:
    """Of seven vectors that repeat, nine picks are the first of each, and then the first that are left."""
    x = degenerate("seven vectors")
    assert METHODS["cdpruner"](x, 9).source.tolist() == [[*range(9)]] * 2
    for picks in METHODS["plain"](x, 7).source % 7:
        assert sorted(picks.tolist()) == [*range(7)]


@given(images(least=4))
def test_fewer_picks_are_the_first_of_more(image: tuple[int, Tensor]) -> None:
    kept, x = image
    unit = unit_rows(x)
    ones = torch.ones(x.shape[:2])
    assert torch.equal(farthest(unit, len(x[0]))[:, :kept], farthest(unit, kept))
    assert torch.equal(largest_volume(unit, len(x[0]), ones)[:, :kept], largest_volume(unit, kept, ones))


@pytest.mark.parametrize("method", ["merge", "centered merge"])
def test_the_rest_goes_to_the_nearest_pick(method: str) -> None:
    (x,) = draw(5, (2, 50, 16))
    reduced = METHODS[method](x, 12)
    assert_partition(reduced, 50, 12)
    assert reduced.sizes.max() > 1
    y = x - x.mean(dim=1, keepdim=True) if "centered" in method else x
    for own, measured, source, group, tokens in zip(x, y, reduced.source, reduced.group, reduced.tokens, strict=True):
        for i in range(50):
            near = [float(torch.nn.functional.cosine_similarity(measured[i], measured[j], dim=0)) for j in source]
            assert near[group[i]] == pytest.approx(max(near), abs=1e-6)
        for slot in range(12):
            torch.testing.assert_close(tokens[slot], own[group == slot].mean(dim=0))


def test_only_the_deciding_columns_decide() -> None:
    (x,) = draw(7, (1, 30, 32))
    for name in ("divprune", "cdpruner"):
        plan = make_plan(Reduction(name, keep_tokens=9), VisionGeometry(30))
        method = plan.reducer
        reduced = method.reduce(x, plan, 16)  # type: ignore[union-attr]
        assert torch.equal(reduced.source, method.reduce(x[..., :16].contiguous(), plan).source)  # type: ignore[union-attr]
        assert not torch.equal(reduced.source, method.reduce(x, plan).source)  # type: ignore[union-attr]
        assert torch.equal(reduced.tokens[0], x[0, reduced.source[0]])


@pytest.mark.parametrize("method", METHODS)
def test_of_a_large_image_no_matrix_is_held(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens, whose rows of cosines are then made one by one."""
    (x,) = draw(11, (2, 150, 64))
    whole = METHODS[method](x, 40)
    monkeypatch.setattr(fold, "AT_ONCE", 2**13)
    monkeypatch.setattr(cosines, "matrix", None)
    parts = METHODS[method](x, 40)
    assert torch.equal(whole.source, parts.source) and torch.equal(whole.group, parts.group)
    torch.testing.assert_close(whole.tokens, parts.tokens)
    assert_same_bits_alone(lambda x: METHODS[method](x, 40), x)


def test_bf16_covers_as_fp32_does() -> None:
    """Rounded tokens make other picks, which are as far from each other."""

    def least_distance(source: Tensor) -> float:
        picked = unit_rows(x)[0, source[0]]
        return float((1 - picked @ picked.mT + 2 * torch.eye(len(picked))).min())

    (x,) = draw(13, (1, 576, 64))
    exact, rounded = divprune(x, 128).source, divprune(x.bfloat16(), 128).source
    assert least_distance(rounded) == pytest.approx(least_distance(exact), rel=0.02)


def test_qwens_tokens_are_standardized() -> None:
    asked = Reduction.parse({"method": "divprune", "ratio": 0.5, "geometry": "centered"})
    assert make_plan(asked, VisionGeometry(64)).options == ("centered", "drop")
    assert make_plan(asked, VisionGeometry(64, merges_patches=True)).options == ("standardized", "drop")
    plain = Reduction.parse({"method": "divprune", "ratio": 0.5, "rest": "merge"})
    assert make_plan(plain, VisionGeometry(64, merges_patches=True)).options == ("plain", "merge")


@pytest.mark.parametrize("value", ["text", "clip"])
def test_cdpruner_knows_no_text(value: str) -> None:
    with pytest.raises(InvalidReduction, match="needs CLIP's text tower") as refusal:
        Reduction.parse({"method": "cdpruner", "ratio": 0.5, "relevance": value})
    assert refusal.value.param == "relevance"
    with pytest.raises(InvalidReduction, match="relevance must be 'none', not 3"):
        Reduction.parse({"method": "cdpruner", "ratio": 0.5, "relevance": 3})
    assert Reduction.parse({"method": "cdpruner", "ratio": 0.5, "relevance": "none"}).options == ()
