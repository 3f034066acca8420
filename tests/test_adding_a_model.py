"""docs/guides/adding-a-model.md quotes a family that tests/engine/test_llava_next.py runs: the quotes must be true."""

from __future__ import annotations

import re
from pathlib import Path

from foldserve.server.engine.families.registry import FAMILY_CLASSES

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_quotes_the_family_line_by_line() -> None:
    family = _lines((ROOT / "server/engine/families/llava_next.py").read_text())
    quotes = re.findall(r"```python\n(.*?)```", (ROOT / "docs/guides/adding-a-model.md").read_text(), re.DOTALL)
    assert len(quotes) == 5
    for quote in quotes:
        assert _lines(quote) in family


def test_every_name_on_the_page_exists() -> None:
    page = re.sub(r"```.*?```", "", (ROOT / "docs/guides/adding-a-model.md").read_text(), flags=re.DOTALL)
    names = set(re.findall(r"`([A-Za-z_]\w*)`", page))
    assert len(names) > 40
    sources = [file for top in ("server", "reducers", "tests") for file in (ROOT / top).rglob("*.py")]
    known = set(re.findall(r"\w+", "".join(file.read_text() for file in sources if file != Path(__file__))))
    assert names - known == set()
    files = set(re.findall(r"`([\w/]+\.py)`", page))
    assert {name for name in files if "NAME" not in name and not any(file.match(name) for file in sources)} == set()


def test_every_architecture_is_on_the_page_of_families() -> None:
    page = (ROOT / "docs/reference/families.md").read_text()
    missing = [name for name in FAMILY_CLASSES if f"`{name}`" not in page]
    assert not missing, "describe them in docs/reference/families.md (docs/guides/adding-a-model.md, step 6)"


def _lines(code: str) -> str:
    """Without indentation and empty lines, as in which methods that stand alone differ."""
    return "".join(f"{line.strip()}\n" for line in code.splitlines() if line.strip())
