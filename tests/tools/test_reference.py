"""The pages of docs/reference say what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from foldserve.reducers import METHODS
from foldserve.server import commands
from tools.reference.pages import FOLDER, pages


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    return pages()


@pytest.mark.parametrize("name", ["api.md", "cli.md", "methods.md", "metrics.md"])
def test_nothing_has_drifted(name: str, made: dict[str, str]) -> None:
    assert (FOLDER / name).read_text() == made[name], f"docs/reference/{name} is not what the code says: make reference"


def test_all_are_written(made: dict[str, str]) -> None:
    assert all(f"\n## foldserve {name}\n" in made["cli.md"] for name in commands.ALL)
    assert all(f"\n| `{name}` |" in made["methods.md"] for name in METHODS)
    assert "\n| `foldserve_pressure` |" in made["metrics.md"]  # of the engine's statistics
    assert "\n| `foldserve_requests_rejected_total` |" in made["metrics.md"]  # of the API
    assert "\n| `POST /v1/messages` |" in made["api.md"]
    assert "\n| `ratio` | number, at least 0, below 1 or `" in made["api.md"]


def test_the_readme_names_every_method() -> None:
    readme = Path(__file__).resolve().parents[2] / "README.md"
    rows = re.findall(r"^\| (`.*?`) \|", readme.read_text().partition("\n## Methods\n")[2], re.MULTILINE)
    named = sorted(name for row in rows for name in re.findall(r"`(\w+)`", row))
    assert named == sorted(METHODS), "the table under `## Methods` in README.md names each method once"
