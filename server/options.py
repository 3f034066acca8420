"""Fields of dataclasses as options of commands; `commands/parser.py` builds the parsers from them."""

from __future__ import annotations

from dataclasses import MISSING, field
from typing import Any, TypeVar

_T = TypeVar("_T")


def option(default: _T, metavar: str | None = None, help: str = "", **more: Any) -> _T:
    """A field that is the option `--its-name`; `--no-its-name` where it is True by default.

    Args:
        default: shown at the end of `help`, unless a "(default: ..." stands there.
        more: metadata. `group` is the title that the help shows above this field and those that follow; `flag` another
            name, and `short` one beside it; `parse` reads the value, where the field's type does not say how;
            `expected` is what the items of a list are called when they can't be read. `action`, `choices` and `nargs`
            are argparse's.
    """
    return field(default=default, metadata={"metavar": metavar, "help": help, **more})


def positional(metavar: str, help: str = "", *, default: Any = MISSING, **more: Any) -> Any:
    """A field that is an argument without a name, and optional if it has a default; `more` as in `option`."""
    return field(default=default, metadata={"metavar": metavar, "help": help, "positional": True, **more})


def flag(name: str) -> str:
    """The option of a field: `--max-image-mb` of `max_image_mb`."""
    return f"--{name.replace('_', '-')}"
