"""`foldserve hash-key`."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from dataclasses import dataclass
from typing import Literal

from foldserve.server.commands.parser import declare
from foldserve.server.options import option, positional

_DESCRIPTION = """\
Makes an API key. The key goes to standard error, to be handed to its owner and kept nowhere else; its entry for the
file of `foldserve serve --api-keys` goes to standard output:

  foldserve hash-key alice --rate 600/minute --concurrent 32 >> keys.toml
"""


@dataclass(frozen=True, slots=True)
class HashKeyOptions:
    name: str = positional("NAME", "of its owner, for logs")
    rate: str | None = option(
        None, "N/PERIOD", "answers it may ask for in a time, such as 600/minute (default: any number)"
    )
    concurrent: int | None = option(
        None, "N", "answers it may have in flight (default: as `foldserve serve --key-concurrent` says)"
    )
    scope: tuple[Literal["api", "metrics"], ...] = option(
        (), None, "what it opens; may come twice (default: api)", action="append"
    )


def add(parser: ArgumentParser) -> None:
    declare(parser, HashKeyOptions, _run, _DESCRIPTION)


def _run(options: HashKeyOptions, rest: list[str]) -> None:
    from foldserve.server.api.auth.keys import entry, new_key

    key = new_key()
    scopes = [*options.scope] or ["api"]
    text = entry(options.name, key, rate=options.rate, concurrent=options.concurrent, scopes=scopes)
    print(text, end="")
    print(f"The key of {options.name}, which is shown only now: {key}", file=sys.stderr)
