"""Every link and picture of the Markdown pages leads to a file, and to a heading if it names one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "deploy").rglob("*.md")])
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def targets(page: str) -> list[str]:
    """Relative ones, out of code."""
    return re.findall(r'(?:\]\(|src=")(?!https?://|mailto:)([^)\s"]+)[)"]', FENCED.sub("", page))


def anchors(page: str) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken(page: Path, text: str) -> list[str]:
    found = []
    for target in targets(text):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file.read_text())):
            found.append(target)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    assert broken(page, page.read_text()) == []


def test_the_check_itself() -> None:
    text = (
        "[a](README.md#two-commands) ![b](nowhere.svg) [c](README.md#nowhere) [d](https://x.org/y)\n```\n[e](f)\n```\n"
    )
    assert broken(ROOT / "README.md", text) == ["nowhere.svg", "README.md#nowhere"]
