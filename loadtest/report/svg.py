"""Figures as SVG with tooltips, in colours that follow the reader's theme."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from foldserve.loadtest.report.theme import style, themed, variables

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NEAR_PT = 4.0
"""Marks closer than this share a tooltip: a pointer could not choose between them."""
_RADIUS_PT = 7.0
_HIT_CSS = ".hit{fill:transparent;stroke:none;cursor:crosshair}.hit:hover{stroke:var(--ink)}"


@dataclass(frozen=True, slots=True)
class Mark:
    """A point in data coordinates, and its tooltip."""

    axes: Axes
    x: float
    y: float
    text: str


def as_svg(figure: Figure, marks: Sequence[Mark] = (), *, alone: bool = True) -> str:
    """SVG text, deterministic; with `alone` it holds its own CSS, else the page has to."""
    text = io.StringIO()
    with style():
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", text.getvalue(), flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>[^<]*</style>", "<style>svg *{stroke-linejoin:round}</style>", svg, count=1)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    svg = _without_unused_ids(themed(svg))
    css = f"<style>{variables('svg')}{_HIT_CSS}</style>" if alone else ""
    hits = "".join(_hits(figure, marks))
    return svg.replace("</svg>", f"{css}{hits}</svg>")


def page_css() -> str:
    """CSS for a page of SVGs without their own."""
    return variables(":root") + _HIT_CSS


def _hits(figure: Figure, marks: Sequence[Mark]) -> Iterator[str]:
    height = figure.bbox.height
    groups: list[tuple[float, float, list[str]]] = []
    for mark in marks:
        x, y = map(float, mark.axes.transData.transform((mark.x, mark.y)))
        if not mark.axes.bbox.padded(_NEAR_PT).contains(x, y):  # its point is cut off
            continue
        near = (group for group in groups if abs(group[0] - x) < _NEAR_PT and abs(group[1] - y) < _NEAR_PT)
        if group := next(near, None):
            group[2].append(mark.text)
        else:
            groups.append((x, y, [mark.text]))
    for x, y, texts in groups:
        place = f'cx="{x:.1f}" cy="{height - y:.1f}" r="{_RADIUS_PT:g}"'
        yield f'<circle class="hit" {place}><title>{escape(chr(10).join(texts))}</title></circle>'


def _without_unused_ids(svg: str) -> str:
    """Matplotlib numbers groups from 1 in every figure, so ids would repeat on a page."""
    used = set(re.findall(r"#([\w-]+)", svg))
    return re.sub(r' id="([\w.-]+)"', lambda found: found[0] if found[1] in used else "", svg)
