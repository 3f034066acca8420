"""docs/guides/security.md: every threat names its tests, and these exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent
FOLDERS = (FOLDER, FOLDER.with_name("engine"), FOLDER.with_name("server"))
PAGE = (FOLDER.parents[1] / "docs" / "guides" / "security.md").read_text()
SHORT = {
    "bad_inputs": "test_bad_inputs",
    "drain": "test_lifecycle_drain",
    "kill": "test_lifecycle_kill",
}
NAMED = re.compile(r"`(?:(\w+): )?(test_\w+)(\.\.\.)?`")
"""`module: test`, or `test` of the module named before; `...` stands for several tests that begin so."""


@cache
def names_in(module: str) -> list[str]:
    file = next(file for folder in FOLDERS if (file := folder / f"{module}.py").is_file())
    nodes = ast.parse(file.read_text()).body
    return [node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def exists(module: str, test: str, several: str) -> bool:
    return any(name == test or (several and name.startswith(test)) for name in names_in(module))


def rows() -> Iterator[str]:
    """The last cell of each row of the tables that have a column of tests."""
    in_table = False
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            in_table = False
        elif cells[-1] == "Test":
            in_table = True
        elif in_table and not set(cells[-1]) <= set("-"):
            yield cells[-1]


def test_every_named_test_exists() -> None:
    module = "test_bad_inputs"  # which the page begins with
    found = NAMED.findall(PAGE)
    for prefix, test, several in found:
        if not prefix and (FOLDER / f"{test}.py").exists():
            module = test  # a whole module
            continue
        module = SHORT.get(prefix, prefix) or module
        assert exists(module, test, several), f"{module}: {test}"
    assert len(found) > 60


def test_every_threat_has_a_test() -> None:
    cells = list(rows())
    assert len(cells) > 36
    for cell in cells:
        first, *_ = NAMED.findall(cell) or [None]
        assert first, f"no test: {cell}"
        assert first[0] or (FOLDER / f"{first[1]}.py").exists(), f"a row names its module itself: {cell}"


def test_a_name_that_is_wrong_is_found() -> None:
    assert exists("test_bad_inputs", "test_999_images", "")
    assert not exists("test_bad_inputs", "test_998_images", "")
    assert not exists("test_bad_inputs", "test_999", "")
    assert exists("test_lifecycle_drain", "test_a_client_that_hangs_up_", "...")
