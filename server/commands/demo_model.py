"""`foldserve demo-model`."""

from __future__ import annotations

import argparse
from pathlib import Path

from foldserve.server.commands.arguments import Commands


def add(commands: Commands) -> None:
    """Declares the command."""
    demo = commands.add_parser("demo-model", help="copy the demo model into a directory, for other programs")
    demo.add_argument("directory", type=Path, metavar="DIR", help="a directory that does not exist yet")
    demo.set_defaults(run=_run, fail=demo.error)


def _run(args: argparse.Namespace, rest: list[str]) -> None:
    from foldserve.server.quality.demo.checkpoint import copy_checkpoint

    try:
        copy_checkpoint(args.directory)
    except FileExistsError as error:
        args.fail(str(error))
    print(f"Wrote {args.directory}. Serve it: foldserve serve {args.directory}")
