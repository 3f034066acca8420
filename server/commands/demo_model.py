"""`foldserve demo-model`."""

from __future__ import annotations

import argparse
from pathlib import Path

from foldserve.server.commands.arguments import Commands


def add(commands: Commands) -> None:
    """Declares the command."""
    demo = commands.add_parser("demo-model", help="write the demo model")
    demo.add_argument("directory", type=Path, metavar="DIR", help="a directory that does not exist yet")
    demo.add_argument("--seed", type=int, default=0, help="other weights for each seed (default: %(default)s)")
    demo.set_defaults(run=_run, fail=demo.error)


def _run(args: argparse.Namespace, rest: list[str]) -> None:
    from foldserve.server.quality import demo_model

    try:
        path = demo_model.create(args.directory, seed=args.seed)
    except FileExistsError as error:
        args.fail(str(error))
    print(f"Wrote {path}. {demo_model.NOTICE}\nServe it: foldserve serve {path}")
