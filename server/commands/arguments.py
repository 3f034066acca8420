"""What the commands' argument declarations share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeAlias, TypeVar

_T = TypeVar("_T")

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def argument(parse: Callable[[str], _T]) -> Callable[[str], _T]:
    """`parse` as argparse wants it: so that the message of its ValueError is shown."""

    def parse_argument(text: str) -> _T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse_argument
