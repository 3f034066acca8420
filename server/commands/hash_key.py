"""`foldserve hash-key`."""

from __future__ import annotations

import argparse
import sys

from foldserve.server.commands.arguments import Commands

_DESCRIPTION = """\
Makes an API key. The key goes to standard error, to be handed to its owner and kept nowhere else; its entry for the
file of `foldserve serve --api-keys` goes to standard output:

  foldserve hash-key alice --rate 600/minute --concurrent 32 >> keys.toml
"""


def add(commands: Commands) -> None:
    """Declares the command."""
    hash_key = commands.add_parser(
        "hash-key",
        help="make an API key",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    hash_key.add_argument("name", metavar="NAME", help="of its owner, for logs")
    hash_key.add_argument("--rate", metavar="N/PERIOD", help="answers it may ask for, as 600/minute (default: any)")
    hash_key.add_argument(
        "--concurrent",
        type=int,
        metavar="N",
        help="answers it may have in flight (default: as `foldserve serve --key-concurrent` says)",
    )
    hash_key.add_argument(
        "--scope", action="append", choices=("api", "metrics"), help="what it opens; may come twice (default: api)"
    )
    hash_key.set_defaults(run=_run, fail=hash_key.error)


def _run(args: argparse.Namespace, rest: list[str]) -> None:
    from foldserve.server.api.auth.keys import entry, new_key

    key = new_key()
    try:
        text = entry(args.name, key, rate=args.rate, concurrent=args.concurrent, scopes=args.scope or ["api"])
    except ValueError as error:
        args.fail(str(error))
    print(text, end="")
    print(f"The key of {args.name}, which is shown only now: {key}", file=sys.stderr)
