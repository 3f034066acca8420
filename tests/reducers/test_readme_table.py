"""The README's table of methods is the registry's."""

from __future__ import annotations

from pathlib import Path

from foldserve.reducers import METHODS
from foldserve.reducers.__main__ import table


def test_readme() -> None:
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    assert table() in readme, "put the output of `python -m foldserve.reducers` into README.md"
    assert all(f"| `{name}` |" in table() for name in METHODS)
