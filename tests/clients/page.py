"""The examples of docs/guides/clients.md, as the page shows them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "guides" / "clients.md"
URL = "http://localhost:8000"
"""Of the server, in the examples."""

_OUTPUT = ""  # the language of such a block
_PIECE = re.compile(r"^#+ (?P<heading>[^\n]+)$|^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Example:
    """A program of the page.

    Attributes:
        name: the heading that it stands under, without marks.
        language: of its block.
        code: with what all examples in this language begin with.
        output: what the page says that it prints.
    """

    name: str
    language: str
    code: str
    output: str


def examples() -> list[Example]:
    return list(_examples(PAGE.read_text()))


def _examples(page: str) -> Iterator[Example]:
    """Each block that an output follows; a block without one is the beginning of all later ones in its language."""
    name = ""
    beginnings: dict[str, str] = {}
    for piece, following in pairwise(re.finditer(_PIECE, page + "\n# The end\n")):
        language = piece["language"]
        if piece["heading"]:
            name = piece["heading"].replace("`", "")
        elif language and following["language"] == _OUTPUT:
            yield Example(name, language, beginnings.get(language, "") + piece["text"], following["text"])
        elif language:
            beginnings[language] = beginnings.get(language, "") + piece["text"]
