"""The studies without an engine: what is computed, and what is written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from torch import Tensor

from foldserve.server import cli
from foldserve.server.quality.analysis.drawing import charts, draw
from foldserve.server.quality.analysis.measures import RATIOS, earth_movers_distance, kept_energy, rank_for
from foldserve.server.quality.analysis.report import Analysis, analyze, summary
from foldserve.server.quality.evaluation.questions import Question
from tests.loadtest.readable import check


def energy_of(x: Tensor) -> Tensor:
    return torch.linalg.svdvals(x).square()[None]


def test_energy_is_what_the_best_approximation_holds() -> None:
    x = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(x)
    approximation = u[:, :5] * s[:5] @ v[:5]
    (shares,) = kept_energy(energy_of(x), 20, [0.75, 0.0])
    assert float(shares[0]) == pytest.approx(1 - float((x - approximation).square().sum() / x.square().sum()), abs=1e-5)
    assert float(shares[1]) == pytest.approx(1)


def test_tokens_of_few_directions_need_few_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(144, 3, generator=generator) @ torch.randn(3, 64, generator=generator)
    assert torch.allclose(kept_energy(energy_of(x), 144), torch.ones(1, len(RATIOS), dtype=torch.float64))
    assert rank_for(energy_of(x), 0.999).tolist() == [3]
    assert rank_for(energy_of(torch.eye(100)), 0.9).tolist() == [90]


def test_distance_of_merged_tokens_is_the_work_of_moving_them() -> None:
    full = torch.tensor([[3.0, 4.0], [3.0, 4.0], [0.0, 5.0], [6.0, 8.0]])  # mean norm 6.25
    merged, sizes = torch.tensor([[6.0, 8.0], [3.0, 4.0], [0.0, 5.0]]), torch.tensor([1.0, 2.0, 1.0])
    assert earth_movers_distance(full, merged, sizes) == pytest.approx(0, abs=1e-9)
    one = torch.tensor([[3.0, 4.0]])
    expected = (10**0.5 + 5) / 4 / 6.25
    assert earth_movers_distance(full, one, torch.tensor([4.0])) == pytest.approx(expected)
    assert earth_movers_distance(9 * full, 9 * one, torch.tensor([4.0])) == pytest.approx(expected)


class Output(NamedTuple):
    tokens: Tensor
    sizes: Tensor


class FakeModel:
    """Two blocks, of which the second merges better, and three layers that look at the image less and less."""

    def energy(self, image: Image.Image) -> Tensor:
        return torch.stack([torch.ones(4), torch.tensor([1.0, 0.0, 0.0, 0.0])])

    def merged(self, image: Image.Image, removed: int) -> tuple[Output, list[Output]]:
        assert removed == 2
        tokens, sizes = torch.eye(4), torch.full((2,), 2.0)
        mean = torch.full((2, 4), 0.25)
        return Output(tokens, torch.ones(4)), [Output(torch.zeros(2, 4), sizes), Output(mean, sizes)]

    def attention(self, image: Image.Image, question: str) -> Tensor:
        share = torch.tensor([0.75, 0.5, 0.25]) if question == "near" else torch.tensor([0.25, 0.0, 0.25])
        last = torch.stack([(1 - share) / 2, share, (1 - share) / 2], dim=-1)
        return torch.stack([last, last.flip(-1)], dim=1)


@pytest.fixture
def analysis() -> Analysis:
    image = Image.new("RGB", (8, 8))
    return analyze("model", FakeModel(), [Question(image, "near"), Question(image, "far")], [4, 4], 0.5)


def test_means_over_the_images(analysis: Analysis) -> None:
    assert (analysis.samples, analysis.ratios) == (2, list(RATIOS))
    assert analysis.energy == [[0.75, 0.5, 0.5, 0.25, 0.25], [1.0] * 5]
    assert analysis.rank_99 == [4.0, 1.0]
    assert analysis.distance == pytest.approx([1.0, 0.75**0.5])
    assert [row[1] for row in analysis.attention_last] == [0.5, 0.25, 0.25]
    assert "least in block 1" in summary(analysis)


def test_pictures(analysis: Analysis, tmp_path: Path) -> None:
    files = draw(analysis, tmp_path)
    assert [file.name for file in files] == ["energy.svg", "distance.svg", "attention.svg", "index.html"]
    assert all(file.stat().st_size > 1000 for file in files)
    for chart in charts(analysis):
        check(chart)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratio", "0"], r"in \(0, 1\), not 0"),
        (["--samples", "0"], "at least one question"),
        (["--data", "/nowhere"], "neither a folder of images nor a JSONL file"),
    ],
)
def test_arguments_that_cannot_be(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["analyze", "model", *arguments])
    assert exit_.value.code == 2
    assert re.search(message, capsys.readouterr().err)
