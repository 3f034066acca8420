"""Dataclass fields as command-line options; `commands/parser.py` builds the parsers from them."""

from __future__ import annotations

from dataclasses import MISSING, field
from typing import Any, TypeVar

_T = TypeVar("_T")


def option(default: _T, metavar: str | None = None, help: str = "", **more: Any) -> _T:
    """A field that is the option `--its-name`, or `--no-its-name` if it is True by default.

    Args:
        default: appended to `help`, unless that contains "(default: ...".
        more: metadata. `group`: title above this and the following fields in the help. `flag`, `short`: another name,
            and a second one. `parse`: reads the value where the field's type is not enough. `expected`: what errors
            call the items of a list. `action`, `choices`, `nargs`: argparse's.
    """
    return field(default=default, metadata={"metavar": metavar, "help": help, **more})


def positional(metavar: str, help: str = "", *, default: Any = MISSING, **more: Any) -> Any:
    """A field that is a positional argument, optional if it has a default; `more` as in `option`."""
    return field(default=default, metadata={"metavar": metavar, "help": help, "positional": True, **more})


def flag(name: str) -> str:
    """`--max-image-mb` for the field `max_image_mb`."""
    return f"--{name.replace('_', '-')}"
