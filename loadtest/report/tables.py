"""Tables of texts, for a page and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

NONE = "-"
"""A cell without a value."""


@dataclass(frozen=True, slots=True)
class Table:
    """One table of a report.

    Attributes:
        labels: how many of the first columns hold names, not numbers.
        key: how many of these name the row together: on a page they are one column, which stays when others scroll.
        note: stands below it on a page.
        is_prose: its cells are sentences.
    """

    title: str
    headings: Sequence[str]
    cells: Sequence[Sequence[str]]
    labels: int = 1
    key: int = 1
    note: str = ""
    is_prose: bool = False

    def markdown(self) -> str:
        """Without title and note."""
        lines = [self.headings, ["---"] * len(self.headings), *self.cells]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)

    def for_page(self) -> Table:
        """With one column in place of those that name the row."""
        headings, *cells = ([", ".join(line[: self.key]), *line[self.key :]] for line in (self.headings, *self.cells))
        return replace(self, headings=headings, cells=cells, labels=max(1, self.labels - self.key + 1), key=1)
