"""The charts of a quality card: which curves they have, that they can be read, and two cards side by side."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from foldserve.reducers import METHODS
from foldserve.reducers.method import InDecoder, Kind
from foldserve.server.quality.evaluation.card import Card, VariantResult
from foldserve.server.quality.evaluation.curves import best, choose_curves, curves
from foldserve.server.quality.evaluation.plots import plots
from foldserve.server.quality.evaluation.scores import Score, share
from foldserve.server.quality.evaluation.side_by_side import table
from foldserve.server.quality.evaluation.tables import write_page
from foldserve.server.quality.evaluation.variants import CONTROLS
from tests.loadtest.readable import check

RATIOS = (0.25, 0.5, 0.75, 0.9)
KINDS = ("attribute", "caption", "color_at", "count", "exist", "ocr", "relation", "two_turn", "where")
TOKENS, LAYERS = 576, 32


def result(
    label: str, ratio: float | None, right: float, *, layer: int | None = None, is_control: bool = False
) -> VariantResult:
    """Of 100 questions, 10 of a kind, of which `right` are answered well; reading suffers first."""
    kept = TOKENS if ratio is None else round(TOKENS * (1 - ratio))
    tokens = float(kept) if layer is None else (TOKENS * layer + kept * (LAYERS - layer) * (ratio is not None)) / LAYERS
    kinds = {kind: _share(10, right * (0.5 if kind == "ocr" and right < 1 else 1)) for kind in KINDS}
    kl = Score(1 - right, 0.9 * (1 - right), 1.1 * (1 - right), 100)
    return VariantResult(
        label=label, ratio=ratio, layer=layer, reduction={"method": label}, kept=kept, kept_deep=0,
        layer_tokens=tokens, count=round(tokens), is_control=is_control, accuracy=_share(100, right), ocr=kinds["ocr"],
        kinds=kinds, lost=0, gained=0, kl=kl, agreement=_share(100, right),
    )  # fmt: skip


def _share(count: int, right: float) -> Score:
    hits = round(count * right)
    return share([True] * hits + [False] * (count - hits))


def _results(loss: float) -> Iterator[VariantResult]:
    yield result("none", 0.0, 1.0).model_copy(update={"reduction": {}})
    for number, (name, method) in enumerate(METHODS.items()):
        if isinstance(method, InDecoder):
            for layer in (4, 8, 16, 24):
                for ratio in [None] if method.default_ratio is None else RATIOS:
                    yield result(name, ratio, 1 - (ratio or 1) * (1 - layer / LAYERS), layer=layer)
        elif name not in CONTROLS:
            for ratio in RATIOS:
                yield result(name, ratio, 1 - loss * ratio * (1 + number))
    yield from (result("folder+withdraw", ratio, 1 - ratio, layer=16) for ratio in RATIOS)
    yield from (result("folder:positions=keep", ratio, 1.0) for ratio in RATIOS)
    for name, lost in zip(CONTROLS, (0.4, 0.7), strict=True):
        for r in (*RATIOS, 0.125, 0.375, 0.625):
            yield result(name, r, 1 - lost * r, is_control=True).model_copy(update={"ratio": None})


def card(loss: float = 0.03, *labels: str) -> Card:
    """With all methods, or with the named ones and the controls."""
    shown = [r for r in _results(loss) if not labels or r.label in ("none", *labels, *CONTROLS)]
    return Card(
        model="org/a-model", model_hash="sha256:1", data="made up", data_hash="sha256:2", questions=100, tokens=TOKENS,
        layers=LAYERS, engine={"vLLM": "0"}, machine="2 CPUs", date="2026-11-30", results=shown, refused=[],
    )  # fmt: skip


@pytest.mark.parametrize("loss", [0.0, 0.1], ids=["all alike", "much lost"])
def test_a_card_can_be_read(loss: float) -> None:
    found = plots({"": card(loss)})
    assert [chart.stem for chart in found] == [
        "accuracy",
        "ocr",
        "count",
        "caption",
        "kl",
        "kinds",
        "accuracy-by-layer",
    ]
    for chart in found:
        check(chart)


def test_at_most_six_methods_of_a_kind_are_drawn_and_the_others_are_named() -> None:
    """The test's methods lose more the later they stand in the registry."""
    of_kind = [name for name, method in METHODS.items() if method.kind == Kind.MERGE]
    assert len(of_kind) >= 8
    assert choose_curves([card()], Kind.MERGE).names == of_kind[:6]
    chart = plots({"": card()})[0]
    svg = chart.whole().svg()
    assert all(f">{name}<" in svg for name in (*of_kind[:6], *CONTROLS))
    assert f">{of_kind[6]}<" not in svg and ", ".join(of_kind[6:8]) in chart.note
    assert {curve.kind for curve in curves(card())} == {*Kind, None}


def test_a_curve_has_the_options_that_came_first_and_two_values_of_k() -> None:
    found = {curve.name: curve for curve in curves(card())}
    assert found["folder"].label == "folder" and "folder:positions=keep" not in {c.label for c in found.values()}
    assert [name for name in found if name.startswith("fastv")] == ["fastv K=8", "fastv K=24"]
    assert [r.layer for r in found["withdraw"].results] == [24, 16, 8, 4]  # one line over all K
    default = best(card())
    assert default is not None and default.name == "folder"


def test_where_k_makes_no_difference_nothing_is_drawn_against_it() -> None:
    small = card(0.03, "withdraw")
    alike = [r.model_copy(update={"accuracy": _share(100, 1), "ocr": _share(10, 1)}) for r in small.results]
    for results, is_drawn in ((small.results, True), (alike, False)):
        stems = {chart.stem for chart in plots({"": small.model_copy(update={"results": results})})}
        assert ("accuracy-by-layer" in stems) == is_drawn


def test_the_page_says_of_what_it_is(tmp_path: Path) -> None:
    small = card(0.03, "folder", "fastv")
    write_page(small, tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert "2 CPUs. 2026-11-30" in page and "<h1>Quality of org/a-model</h1>" in page
    assert "folder, ratio 0.5, 288 tokens: 98.0 [93.0, 99.4]" in page
    assert {file.stem for file in tmp_path.glob("*.svg")} == {chart.stem for chart in plots({"": small})}


def test_two_cards_beside_each_other_can_be_read_and_differ_by_what_they_differ() -> None:
    both = {
        name: card(loss, "folder", "tome", "fastv", "withdraw") for name, loss in (("before", 0.03), ("after", 0.1))
    }
    for chart in plots(both):
        check(chart)
    found = {tuple(cells[:3]): cells[3:] for cells in table(both).cells}
    accuracy = found["folder", "0.9", "-"][:4]
    assert accuracy == ["97.0 [91.5, 99.0]", "91.0 [83.8, 95.2]", "-6.0 [-13.5, 0.9]", "-"]
    assert found["tome", "0.9", "-"][3] == "yes"
    assert not any(name in CONTROLS for name, *_ in found)
