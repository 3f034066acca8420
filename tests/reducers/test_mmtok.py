"""MMTok against a naive implementation, and properties for all images, even if all tokens are alike."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from foldserve.reducers import mmtok
from foldserve.reducers.fold import Reduced
from foldserve.reducers.method import SideInputs
from foldserve.reducers.mmtok import MMTok, coverage, keywords, most_covering
from foldserve.reducers.plan import Plan, Reduction, VisionGeometry, make_plan
from tests.reducers.check import assert_nothing_read, draw, few
from tests.reducers.naive import naive_mmtok

WIDTHS = (12, 7, 12)  # of projected tokens, of the tower's, of the query's


def plan_of(n: int, kept: int, form: str = "keywords") -> Plan:
    geometry = VisionGeometry(n, None, 2, shows_tower=True)
    return make_plan(Reduction.parse({"method": "mmtok", "keep_tokens": kept, "query_form": form}), geometry)


def reduce(x: Tensor, plan: Plan, tower: Tensor, queries: list[Tensor] | None) -> Reduced:
    assert isinstance(plan.reducer, MMTok)
    return plan.reducer.reduce(x, plan, None, SideInputs(tower, queries))


def drawn(seed: int, n: int, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Tokens much alike, as those of a model are: of others a word would have but one that is near."""
    batch = len(lengths)
    x, tower, text = draw(seed, (batch, n, WIDTHS[0]), (batch, n, WIDTHS[1]), (batch, 64, WIDTHS[2]))
    x, tower = x / 8 + x[:1, :1], tower / 2 + tower[:1, :1]
    return x, tower, [own[:length] for own, length in zip(text, lengths, strict=True)]


@few
@given(st.integers(3, 40), st.integers(0, 9), st.sampled_from(["keywords", "question"]), st.data())
def test_it_picks_what_the_plain_twin_picks(n: int, words: int, form: str, data: st.DataObject) -> None:
    kept, seed = data.draw(st.integers(2, n - 1)), data.draw(st.integers(0, 2**31))
    x, tower, queries = drawn(seed, n, (words,))
    tokens, sizes, source, group = reduce(x, plan_of(n, kept, form), tower, queries)
    temperature = {"keywords": 0.02, "question": 0.01}[form]
    assert source[0].tolist() == naive_mmtok(x[0], tower[0], queries[0], kept, temperature)
    assert torch.equal(tokens, x[:, source[0]])
    assert (sizes == 1).all()
    assert torch.equal(group[0, source[0]], torch.arange(kept))
    assert (group[0] >= 0).sum() == kept


def test_the_query_decides() -> None:
    """As its form does; none at all leaves the image's own coverage, whatever `queries` looks like then."""
    x, tower, queries = drawn(0, 64, (5, 5, 0))
    x, tower, plan = x[:1].expand(3, -1, -1), tower[:1].expand(3, -1, -1), plan_of(64, 8)
    first, second, none = reduce(x, plan, tower, queries).source
    question, *_ = reduce(x, plan_of(64, 8, "question"), tower, queries).source
    assert not any(torch.equal(first, other) for other in (second, none, question))
    assert torch.equal(reduce(x, plan, tower, None).source, none.expand(3, -1))


@few
@given(st.integers(4, 60), st.lists(st.integers(0, 64), min_size=2, max_size=4), st.data())
def test_an_image_alone_is_the_image_in_a_batch(n: int, lengths: list[int], data: st.DataObject) -> None:
    """Bit for bit, in any order, whatever the others' queries are, and in parts."""
    x, tower, queries = drawn(data.draw(st.integers(0, 2**31)), n, tuple(lengths))
    plan = plan_of(n, data.draw(st.integers(2, n - 1)))
    together = reduce(x, plan, tower, queries)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mmtok, "AT_ONCE", 3 * n * (n + 64) // 2)
        assert all(map(torch.equal, together, reduce(x, plan, tower, queries)))
    for i in data.draw(st.permutations(range(len(lengths)))):
        alone = reduce(x[i : i + 1], plan, tower[i : i + 1], queries[i : i + 1])
        assert all(torch.equal(a, b[i : i + 1]) for a, b in zip(alone, together, strict=True))


@few
@given(st.integers(3, 40), st.sampled_from(["twins", "one colour", "zeros"]), st.data())
def test_tokens_that_are_alike(n: int, kind: str, data: st.DataObject) -> None:
    """As many as planned, none of them twice, in position order; of equals the first."""
    x, tower, queries = drawn(data.draw(st.integers(0, 2**31)), n, (4,))
    if kind == "twins":
        x, tower = x[:, torch.arange(n) // 2], tower[:, torch.arange(n) // 2]
    else:
        x, tower = (some[:, :1].expand(-1, n, -1) * (kind != "zeros") for some in (x, tower))
    kept = data.draw(st.integers(2, n - 1))
    reduced = reduce(x, plan_of(n, kept), tower, queries)
    assert reduced.source.shape == (1, kept)
    assert (reduced.source.diff() > 0).all()
    assert reduced.tokens.isfinite().all()
    if kind == "zeros":
        assert reduced.source[0].tolist() == list(range(kept))


def test_picks_are_nested_and_excluded_tokens_come_last() -> None:
    x, tower, (text,) = drawn(1, 50, (6,))
    covers = coverage(x[0], tower[0], text, text_temperature=0.02)[None]
    picks = [set(most_covering(covers, kept)[0].tolist()) for kept in range(1, 51)]
    assert all(less < more for less, more in pairwise(picks))
    excluded = sorted(picks[20])  # 21 tokens, which would be the first
    for kept in (5, 29, 30, 45):
        chosen = most_covering(covers, kept, excluded)[0].tolist()
        assert len(chosen) == len(set(chosen)) == kept
        assert [i for i in chosen if i in excluded] == excluded[: max(0, kept - 29)]


@few
@given(st.integers(3, 90), st.integers(0, 40), st.sampled_from(["any", "twins", "small numbers"]), st.data())
def test_lazy_picks_are_those_of_the_greedy_choice(n: int, words: int, kind: str, data: st.DataObject) -> None:
    """In the order of picking, with equal gains too, whatever `torch.topk` takes first of these."""
    seed = data.draw(st.integers(0, 2**31))
    x, tower, (text,) = drawn(seed, n, (words,))
    places = torch.arange(n) // (2 if kind == "twins" else 1)
    covers = coverage(x[0, places], tower[0, places], text, text_temperature=0.02)[None]
    if kind == "small numbers":
        covers = draw(seed, (1, n, 9))[0].abs().floor()
    exclude = sorted(data.draw(st.sets(st.integers(0, n - 1), max_size=n - 2)))
    kept = data.draw(st.integers(1, n - len(exclude)))
    picks = mmtok._greedily(covers, kept, exclude)
    for together in (mmtok._PARALLEL, 3 * covers.shape[2]):  # rows at once: all, and two
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mmtok, "_PARALLEL", together)
            assert torch.equal(mmtok._lazily(covers, kept, exclude), picks)


class _Split(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes operators that torch splits between threads on a CPU: by their size, or always."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [each.numel() for each in tree_leaves(made) if isinstance(each, Tensor)]
        is_large = not func.is_view and max(sizes, default=0) >= 32768
        if is_large or func is torch.ops.aten.index.Tensor:
            self.seen.add(str(func))
        return made


@pytest.mark.parametrize(("n", "batch"), [(100, 3), (300, 1), (300, 2), (mmtok.MOST_TOKENS, 1)])
def test_no_step_of_a_choice_on_a_cpu_is_split_between_threads(n: int, batch: int) -> None:
    covers = draw(4, (batch, n, n + 64))[0].abs()
    with _Split() as split:
        most_covering(covers, n // 4)
    assert not split.seen


def test_half_precision_covers_as_well() -> None:
    """Features that are rounded make other picks, which are worth as much: the comparison itself is in fp32."""
    x, tower, queries = drawn(2, 144, (6,))
    plan = plan_of(144, 36)
    covers = coverage(x[0], tower[0], queries[0], text_temperature=0.02)
    exact = reduce(x, plan, tower, queries).source[0]
    for dtype in (torch.bfloat16, torch.float16):
        half = reduce(x.to(dtype), plan, tower.to(dtype), [query.to(dtype) for query in queries])
        assert half.tokens.dtype == dtype
        assert (half.source.diff() > 0).all()
        whole, rounded = (covers[source].amax(dim=0).sum() for source in (exact, half.source[0]))
        assert rounded == pytest.approx(whole.item(), rel=0.02)


def test_nothing_is_read_from_the_device() -> None:
    x, tower, (text,) = drawn(3, 30, (6,))
    plan = plan_of(30, 7)
    assert_nothing_read(lambda x, tower, text: reduce(x, plan, tower, [text]), x, tower, text)


def test_a_question_that_says_nothing_is_no_query() -> None:
    question, words = MMTok("question"), MMTok("keywords")
    assert question.query_texts("  ") == words.query_texts("  ") == []
    assert question.query_texts("Where is it?") == ["Question: Where is it?"]
    assert words.query_texts("Is THE cat here?") == ["cat", "here"]
    assert keywords("Where is it? Answer the question using a single word or phrase.") == "Where is it?"
