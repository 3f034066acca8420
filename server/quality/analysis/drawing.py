"""The three studies as pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from foldserve.server.quality.analysis.report import Analysis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PARTS = ("before the image", "image", "behind the image")


def draw(analysis: Analysis, folder: Path) -> list[Path]:
    """Writes energy.svg, distance.svg and attention.svg."""
    from matplotlib.figure import Figure

    pictures: dict[str, Callable[[Axes, Analysis], None]] = {
        "energy": _energy,
        "distance": _distance,
        "attention": _attention,
    }
    files = []
    for name, paint in pictures.items():
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        paint(axes, analysis)
        axes.grid(alpha=0.3)
        files.append(folder / f"{name}.svg")
        figure.savefig(files[-1], metadata={"Date": None})
    return files


def _energy(axes: Axes, analysis: Analysis) -> None:
    for column, ratio in enumerate(analysis.ratios):
        axes.plot([row[column] for row in analysis.energy], marker="o", label=f"ratio {ratio:g}")
    axes.set_xlabel("tower block")
    axes.set_ylabel("energy that the tokens left can hold")
    axes.set_title(f"{analysis.model}: SVD energy ({analysis.samples} images)")
    axes.legend()


def _distance(axes: Axes, analysis: Analysis) -> None:
    axes.plot(analysis.distance, marker="o")
    axes.set_xlabel("tower block in which tokens are merged")
    axes.set_ylabel("earth mover's distance of the output, relative")
    axes.set_title(f"{analysis.model}: merging {analysis.merge_ratio:g} of the tokens ({analysis.samples} images)")


def _attention(axes: Axes, analysis: Analysis) -> None:
    for part, name in enumerate(_PARTS):
        (line,) = axes.plot([row[part] for row in analysis.attention_last], marker="o", label=f"last token to {name}")
        text = [row[part] for row in analysis.attention_text]
        axes.plot(text, linestyle="--", color=line.get_color(), label=f"mean of the text to {name}")
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("share of attention")
    axes.set_title(f"{analysis.model}: attention by layer ({analysis.samples} questions)")
    axes.legend(fontsize="small")
