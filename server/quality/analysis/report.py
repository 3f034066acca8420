"""Runs the studies over several images; their means are one JSON value."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean as mean
from typing import Protocol

import torch
from PIL.Image import Image
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from tqdm import tqdm  # comes with vLLM

from foldserve.server.quality.analysis.measures import RATIOS, by_part, earth_movers_distance, kept_energy, rank_for
from foldserve.server.quality.evaluation.questions import Question


class Output(Protocol):
    @property
    def tokens(self) -> Tensor:
        """(n, d)"""

    @property
    def sizes(self) -> Tensor:
        """(n,) patches in each."""


class StudiedModel(Protocol):
    """A loaded model; `server/engine/study.py` has the real one."""

    def energy(self, image: Image) -> Tensor:
        """(blocks, rank) squared singular values after each tower block."""

    def merged(self, image: Image, removed: int) -> tuple[Output, Sequence[Output]]:
        """The tower's output, and that with merging in each block."""

    def attention(self, image: Image, question: str) -> Tensor:
        """(layers, 2, 3) shares: from the last token and from all text, to what is before, in and behind the image."""


class Analysis(BaseModel):
    """Means over the images.

    Attributes:
        tokens: vision tokens per image.
        energy: for each tower block and each of `ratios`, the largest share of energy that the tokens left can hold.
        rank_99: for each tower block, the fewest tokens that can hold 99 % of the energy.
        distance: for each tower block, earth mover's distance of the tower's output if `merge_ratio` is merged there.
        attention_last: for each decoder layer, attention of the last prompt token to (before image, image, behind it).
        attention_text: the same, mean over all tokens behind the image.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    samples: int
    tokens: float
    ratios: list[float]
    energy: list[list[float]]
    rank_99: list[float]
    merge_ratio: float
    distance: list[float]
    attention_last: list[list[float]]
    attention_text: list[list[float]]


def analyze(
    name: str, model: StudiedModel, samples: Sequence[Question], tokens: Sequence[int], ratio: float
) -> Analysis:
    """Runs the three studies, with a progress bar over the samples.

    Args:
        tokens: vision tokens of each image.
        ratio: share of them that is merged for the distances.
    """
    energies, ranks, distances, attentions = [], [], [], []
    for sample, n in tqdm([*zip(samples, tokens, strict=True)], desc="foldserve analyze", unit="image"):
        image = sample.open()
        energy = model.energy(image)
        energies.append(kept_energy(energy, n))
        ranks.append(rank_for(energy, 0.99).double())
        full, merged = model.merged(image, int(n * ratio))
        distances.append([earth_movers_distance(full.tokens, output.tokens, output.sizes) for output in merged])
        attentions.append(model.attention(image, sample.text))
    attention = by_part(torch.stack(attentions).mean(0))
    return Analysis(
        model=name,
        samples=len(samples),
        tokens=mean(tokens),
        ratios=list(RATIOS),
        energy=torch.stack(energies).mean(0).tolist(),
        rank_99=torch.stack(ranks).mean(0).tolist(),
        merge_ratio=ratio,
        distance=torch.tensor(distances, dtype=torch.float64).mean(0).tolist(),
        attention_last=attention["last"],
        attention_text=attention["text"],
    )


def summary(analysis: Analysis) -> str:
    """The result as text for the terminal."""
    block = min(range(len(analysis.distance)), key=analysis.distance.__getitem__)
    vision = [shares[1] for shares in analysis.attention_last]
    rows = [
        f"  block {i:2d}   99 % of the energy in {rank:6.1f} tokens   distance {distance:.4f}"
        for i, (rank, distance) in enumerate(zip(analysis.rank_99, analysis.distance, strict=True))
    ]
    attention = [f"  layer {i:2d}   {share:.4f}" for i, share in enumerate(vision)]
    return "\n".join(
        [
            f"Tower, {analysis.tokens:g} tokens, means over {analysis.samples} images; distance at ratio "
            f"{analysis.merge_ratio:g}:",
            *rows,
            f"Merging changes the tower's output least in block {block}.",
            "Share of the last prompt token's attention that goes to the image:",
            *attention,
        ]
    )
