"""The commands of the README and of docs/, as the pages show them.

A block of commands is fenced as `sh`, `bash` or `console` and runs in a test. One that no test can run says why in its
title, which readers see: `title="needs a GPU"`, or another of `MARKS`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TUTORIAL = "docs/start/tutorial.md"
SHELLS = ("bash", "console", "sh")
STARTS_A_SERVER = "starts a server"
MARKS = (
    STARTS_A_SERVER,
    "downloads",
    "needs a GPU",
    "needs a cluster",
    "needs containers",
    "takes minutes to hours",
    "with a model of yours",
)
OUTPUT = ("", "text")
"""Languages of a block that shows what the one above it prints."""

_FENCE = re.compile(r"^( *)```([\w-]*)([^\n`]*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
_VARIABLE = re.compile(r"\$\w+")
_TITLE = re.compile(r' title="([^"]+)"')


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        place: page and line.
        language: its first word, "" without.
        mark: why it can't run, "" if it can.
        text: without the indentation of its fence.
        output: what the page says that it prints, None if it says nothing; `...` stands for anything.
    """

    place: str
    language: str
    mark: str
    text: str
    output: str | None

    @property
    def page(self) -> str:
        return self.place.partition(":")[0]

    @property
    def is_commands(self) -> bool:
        return self.language in SHELLS

    @property
    def _prompt(self) -> str:
        return "$ " if self.language == "console" else ""

    def commands(self) -> Iterator[list[str]]:
        """Words behind `foldserve` of each line that calls it, up to where its output goes; a variable is 1."""
        for line in self.text.replace("\\\n", " ").splitlines():
            if line.strip().startswith(f"{self._prompt}foldserve "):
                words = shlex.split(_VARIABLE.sub("1", line.strip().removeprefix(self._prompt)), comments=True)
                ends = [place for place, word in enumerate(words) if word in (">", ">>", "|", "&")]
                yield words[1 : ends[0] if ends else None]


def blocks() -> list[Block]:
    return [block for page in PAGES for block in _blocks(str(page.relative_to(ROOT)), page.read_text())]


def _blocks(name: str, page: str) -> Iterator[Block]:
    fences = list(_FENCE.finditer(page))
    for fence, following in zip_longest(fences, fences[1:]):
        indent, language, info, text = fence.groups()
        title = _TITLE.fullmatch(info)
        is_output = following and following[2] in OUTPUT and not page[fence.end() : following.start()].strip()
        yield Block(
            f"{name}:{page.count(chr(10), 0, fence.start()) + 1}",
            language,
            title[1] if title else info.strip(),
            re.sub(f"^{indent}", "", text, flags=re.MULTILINE),
            following[4] if following and is_output else None,
        )
