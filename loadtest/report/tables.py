"""Tables of texts, for a page and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NONE = "-"
"""A cell without a value."""


@dataclass(frozen=True, slots=True)
class Table:
    """One table of a report.

    Attributes:
        labels: how many of the first columns hold names, not numbers.
        note: stands below it on a page.
        is_prose: its cells are sentences.
    """

    title: str
    headings: Sequence[str]
    cells: Sequence[Sequence[str]]
    labels: int = 1
    note: str = ""
    is_prose: bool = False

    def markdown(self) -> str:
        """Without title and note."""
        lines = [self.headings, ["---"] * len(self.headings), *self.cells]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
