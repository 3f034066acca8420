"""Draws the diagram of imports in docs/explanation/design.md from the source: `python -m tools.arrows`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "explanation" / "design.md"
PACKAGE = "foldserve"
FOLDERS = ("server", "reducers", "kernels", "loadtest", "deploy")
SOURCES = sorted(path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

DESCRIPTIONS = {
    "server/cli": "the command line",
    "server/commands": "one command a file",
    "server/api": "the OpenAI front",
    "server/quality": "evaluation, calibration",
    "server/convert": "other layouts into ours",
    "server/engine": "what runs inside vLLM",
    "server": "settings, guardian, ...",
    "kernels": "Triton twins",
    "loadtest/micro": "benchmarks of parts",
    "loadtest": "throughput, soak",
    "loadtest/report": "tables, charts, pages",
    "reducers": "methods, in pure torch",
    "deploy": "standard library only",
}
"""Folder -> its description in the diagram. A module belongs to the longest matching folder."""

Arrow = tuple[str, str]
_START, _END = "<!-- drawn by python -m tools.arrows -->\n", "<!-- end of the drawing -->\n"


def place_of(file: Path) -> str:
    """server/engine/__init__.py -> server/engine"""
    return file.with_suffix("").as_posix().removesuffix("/__init__")


def within(place: str, folder: str) -> bool:
    return place == folder or place.startswith(f"{folder}/")


def imported(source: str, module: str) -> Iterator[str]:
    """Dotted names that `source`, the text of `module`, imports, also in functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)


def imports_of(file: Path, source: str) -> Iterator[str]:
    return imported(source, f"{PACKAGE}.{'.'.join(file.with_suffix('').parts)}")


def folder_of(place: str) -> str:
    return max((folder for folder in DESCRIPTIONS if within(place, folder)), key=len)


def arrows() -> set[Arrow]:
    """Pairs (importer, imported) of folders; imported may be "vllm"."""
    found = set()
    for file in SOURCES:
        folder = folder_of(place_of(file))
        for name in imports_of(file, (ROOT / file).read_text()):
            top, *rest = name.split(".")
            if top == PACKAGE and rest:
                found.add((folder, folder_of("/".join(rest))))
            elif top == "vllm":
                found.add((folder, top))
    return {(a, b) for a, b in found if a != b}


def without_detours(graph: set[Arrow]) -> set[Arrow]:
    """The transitive reduction of the graph; CycleError if folders import each other, directly or not."""
    TopologicalSorter({a: [d for c, d in graph if c == a] for a, _ in graph}).prepare()
    return {
        (a, b) for a, b in graph if not any((a, c) in graph and _has_path(graph, c, b) for c in DESCRIPTIONS if c != b)
    }


def _has_path(graph: set[Arrow], a: str, b: str) -> bool:
    return (a, b) in graph or any(_has_path(graph, d, b) for c, d in graph if c == a)


def picture(graph: set[Arrow]) -> str:
    """The diagram in Mermaid, which GitHub renders."""
    with_vllm = {a for a, b in graph if b == "vllm"}
    ours = {arrow for arrow in graph if "vllm" not in arrow}
    order = [folder for folder in DESCRIPTIONS if any(folder in arrow for arrow in ours)]
    lines = ["flowchart TD"]
    lines += [
        f'    {_id(folder)}["<b>{folder}</b><br>{DESCRIPTIONS[folder]}"]{_style(folder in with_vllm)}'
        for folder in order
    ]
    drawn = sorted(without_detours(ours), key=lambda arrow: (order.index(arrow[0]), order.index(arrow[1])))
    lines += [f"    {_id(a)} --> {_id(b)}" for a, b in drawn]
    lines += ["    classDef vllm stroke-width:3px"]
    return "\n".join(["```mermaid", *lines, "```"]) + "\n"


def _id(folder: str) -> str:
    return folder.replace("/", "_")


def _style(with_vllm: bool) -> str:
    return ":::vllm" if with_vllm else ""


def redrawn(page: str) -> str:
    """The page with a new diagram."""
    before, rest = page.split(_START)
    _, after = rest.split(_END)
    return before + _START + picture(arrows()) + _END + after


if __name__ == "__main__":
    PAGE.write_text(redrawn(PAGE.read_text()))
