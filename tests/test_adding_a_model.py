"""docs/guides/adding-a-model.md quotes a family that tests/engine/test_llava_next.py runs: the quotes must be true."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_quotes_the_family_line_by_line() -> None:
    family = _lines((ROOT / "server/engine/families/llava_next.py").read_text())
    quotes = re.findall(r"```python\n(.*?)```", (ROOT / "docs/guides/adding-a-model.md").read_text(), re.DOTALL)
    assert len(quotes) == 5
    for quote in quotes:
        assert _lines(quote) in family


def test_every_name_on_the_page_exists() -> None:
    page = (ROOT / "docs/guides/adding-a-model.md").read_text()
    sources = [(ROOT / name).read_text() for name in ("server/engine/family.py", "reducers/item.py")]
    sources += [file.read_text() for file in (ROOT / "server/engine/families").glob("*.py")]
    names = (
        "AfterTowerFamily",
        "ImageTokens",
        "Tiling",
        "shape_ints",
        "largest",
        "separators",
        "grids",
        "pack",
        "encode",
    )
    for name in names:
        assert f"`{name}`" in page
        assert any(name in source for source in sources)


def _lines(code: str) -> str:
    """Without indentation and empty lines, as in which methods that stand alone differ."""
    return "".join(f"{line.strip()}\n" for line in code.splitlines() if line.strip())
