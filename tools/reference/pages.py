from __future__ import annotations

from pathlib import Path

from tools.reference import api, cli, methods, metrics

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "reference"
_NOTE = "\n<!-- Written by `make reference` from the code: change it there. -->\n"


def pages() -> dict[str, str]:
    """The pages: file -> text."""
    made = {"api.md": api.page(), "cli.md": cli.page(), "methods.md": methods.page(), "metrics.md": metrics.page()}
    return {name: text.replace("\n", f"\n{_NOTE}", 1) for name, text in made.items()}
