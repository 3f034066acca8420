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
        labels: number of leading columns that hold text.
        key: number of leading columns that name the row: a page joins them into one, which stays when others scroll.
        note: text below it on a page.
        is_prose: cells are sentences.
    """

    title: str
    headings: Sequence[str]
    cells: Sequence[Sequence[str]]
    labels: int = 1
    key: int = 1
    note: str = ""
    is_prose: bool = False

    def markdown(self) -> str:
        """The cells, without title and note."""
        lines = [self.headings, ["---"] * len(self.headings), *self.cells]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)

    def for_page(self) -> Table:
        """This table with the `key` columns joined into one."""
        headings, *cells = ([", ".join(line[: self.key]), *line[self.key :]] for line in (self.headings, *self.cells))
        return replace(self, headings=headings, cells=cells, labels=max(1, self.labels - self.key + 1), key=1)
