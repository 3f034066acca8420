"""`foldserve analyze`."""

from __future__ import annotations

import argparse
from pathlib import Path

from foldserve.server.commands.arguments import Commands

_DESCRIPTION = """\
Shows, without labels, where a model can do with fewer vision tokens: how much of the tower's energy few tokens can hold
after each block, how far the tower's output moves when tokens are merged in each block, and how much attention each
decoder layer pays to the image. docs/evaluation.md says how to read it.

MODEL is a Hugging Face name or a local directory and comes first. Engine options of `vllm serve` work here too.
"""


def add(commands: Commands) -> None:
    """Declares the command."""
    analyze = commands.add_parser(
        "analyze",
        help="show where a model can do with fewer vision tokens",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = analyze.add_argument
    add("model", metavar="MODEL")
    add("--data", type=Path, metavar="DIR|JSONL", help="as evaluate takes it (default: built-in scenes)")
    add("--samples", type=int, default=20, metavar="N", help="images to take from the data (default: %(default)s)")
    add(
        "--question",
        default="Describe this image in detail.",
        metavar="TEXT",
        help='asked of images that bring none (default: "%(default)s")',
    )
    add("--ratio", type=float, default=0.5, metavar="R", help="share of tokens merged (default: %(default)s)")
    add("--output", type=Path, default=Path("analysis"), metavar="DIR", help="(default: %(default)s)")
    analyze.set_defaults(run=_run, takes_engine_options=True, fail=analyze.error)


def _run(args: argparse.Namespace, rest: list[str]) -> None:
    from foldserve.server.quality.analysis.command import Options, run

    names = ("model", "data", "samples", "question", "ratio", "output")
    try:
        run(Options(**{name: getattr(args, name) for name in names}), rest)
    except ValueError as error:
        args.fail(str(error))
