"""`python -m foldserve.reducers`: the README's table of methods."""

from __future__ import annotations

from foldserve.reducers import METHODS
from foldserve.reducers.method import Method


def table() -> str:
    """Markdown, a row for each method."""
    rows = ["| Method | Works | What it does | Its own fields |", "|---|---|---|---|", *map(_row, METHODS.values())]
    return "\n".join(rows) + "\n"


def _row(method: Method) -> str:
    fields = [option.name for option in method.options] + ["decoder"] * (method.decoder_half is not None)
    fields += ["query"] * method.takes_query
    paper = f" *{method.paper}*" if method.paper else ""
    works = method.stage.value.replace("_", " ")
    return f"| `{method.name}` | {works} | {method.summary}{paper} | {', '.join(f'`{name}`' for name in fields)} |"


if __name__ == "__main__":
    print(table(), end="")
