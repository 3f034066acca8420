"""Light and dark colours of charts and pages, and matplotlib's settings."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

INK, MUTED, GRID, PAPER = "#1f2937", "#6b7280", "#e5e7eb", "#fefefe"
SERIES = ("#2563eb", "#c2410c", "#047857", "#9333ea", "#be123c", "#0e7490")
"""Colours of the lines in a panel."""

_DARK = {
    INK: "#e5e7eb", MUTED: "#9ca3af", GRID: "#374151", PAPER: "#111827",
    **dict(zip(SERIES, ("#60a5fa", "#fb923c", "#34d399", "#c084fc", "#fb7185", "#22d3ee"), strict=True)),
}  # fmt: skip
_NAMES = {
    INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper",
    **{colour: f"--series-{number}" for number, colour in enumerate(SERIES, start=1)},
}  # fmt: skip

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "foldserve",
    "figure.dpi": 72,  # a pixel is a point, as in the SVG
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "font.size": 8.5,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.color": GRID,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
}


def style() -> AbstractContextManager[None]:
    """Context in which charts are drawn."""
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def themed(svg: str) -> str:
    """The SVG with a CSS variable in place of each colour."""
    for colour, name in _NAMES.items():
        svg = svg.replace(colour, f"var({name})")
    return svg


def variables(selector: str) -> str:
    """CSS that sets the colour variables, by the reader's light or dark theme."""
    light, dark = (
        ";".join(f"{name}:{values[colour]}" for colour, name in _NAMES.items())
        for values in ({colour: colour for colour in _NAMES}, _DARK)
    )
    return f"{selector}{{{light}}}@media (prefers-color-scheme:dark){{{selector}{{{dark}}}}}"
