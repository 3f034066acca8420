"""The three studies as pictures."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from foldserve.loadtest.report.charts import one_panel, write
from foldserve.server.quality.analysis.report import Analysis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PARTS = ("before the image", "image", "behind the image")


def draw(analysis: Analysis, folder: Path) -> list[Path]:
    """Writes energy.svg, distance.svg and attention.svg."""
    charts: dict[str, Callable[[Analysis, Axes], None]] = {
        "energy": _energy,
        "distance": _distance,
        "attention": _attention,
    }
    files = {folder / f"{name}.svg": partial(paint, analysis) for name, paint in charts.items()}
    for file, paint in files.items():
        write(one_panel(paint), file)
    return list(files)


def _energy(analysis: Analysis, axes: Axes) -> None:
    for column, ratio in enumerate(analysis.ratios):
        axes.plot([row[column] for row in analysis.energy], marker="o", label=f"ratio {ratio:g}")
    axes.set_xlabel("tower block")
    axes.set_ylabel("energy that the tokens left can hold")
    axes.set_title(f"{analysis.model}: SVD energy ({analysis.samples} images)")
    axes.legend()


def _distance(analysis: Analysis, axes: Axes) -> None:
    axes.plot(analysis.distance, marker="o")
    axes.set_xlabel("tower block in which tokens are merged")
    axes.set_ylabel("earth mover's distance of the output, relative")
    axes.set_title(f"{analysis.model}: merging {analysis.merge_ratio:g} of the tokens ({analysis.samples} images)")


def _attention(analysis: Analysis, axes: Axes) -> None:
    for part, name in enumerate(_PARTS):
        (line,) = axes.plot([row[part] for row in analysis.attention_last], marker="o", label=f"last token to {name}")
        text = [row[part] for row in analysis.attention_text]
        axes.plot(text, linestyle="--", color=line.get_color(), label=f"mean of the text to {name}")
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("share of attention")
    axes.set_title(f"{analysis.model}: attention by layer ({analysis.samples} questions)")
    axes.legend(fontsize="small")
