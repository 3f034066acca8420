from __future__ import annotations

from collections.abc import Iterable, Sequence

_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;"}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace(chr(10), ' ') for cell in line)} |\n" for line in lines)


def code(text: str) -> str:
    """Code for a table cell, with pipes escaped."""
    if not text:
        return ""
    return f"<code>{escaped(text)}</code>" if "|" in text else f"`{text}`"


def escaped(text: str) -> str:
    return "".join(_ENTITIES.get(letter, letter) for letter in text)


def prose(text: str) -> str:
    """Text for a table cell; code in backticks is left as it is."""
    parts = text.split("`")
    return "".join(code(part) if number % 2 else escaped(part) for number, part in enumerate(parts))
