"""`foldserve convert`."""

from __future__ import annotations

import argparse
from pathlib import Path

from foldserve.server.commands.arguments import Commands, argument

_DESCRIPTION = """\
Writes a LLaVA-STF checkpoint of the authors' layout in the one that `foldserve serve` reads. SRC and DIR are local
directories; DST is new. Needs memory for one file of 2 GB, and as much disk as the checkpoint.
"""


def add(commands: Commands) -> None:
    """Declares the command, which has one form for each kind of checkpoint."""
    convert = commands.add_parser("convert", help="bring a checkpoint into the layout that is served")
    kinds = convert.add_subparsers(title="kinds", metavar="KIND", required=True)
    stf = kinds.add_parser(
        "stf",
        help="LLaVA-STF: vision tokens fused by a trained projector",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    stf.add_argument("source", type=Path, metavar="SRC", help="the authors' checkpoint")
    stf.add_argument("target", type=Path, metavar="DST", help="a directory that does not exist yet")
    stf.add_argument(
        "--vision-tower", type=Path, metavar="DIR", help="the CLIP model, where SRC does not hold the vision tower"
    )
    stf.add_argument(
        "--layers",
        type=argument(_layers),
        metavar="N,N,...",
        help="hidden states that are fused, deepest first (default: 23,21,18,15,12,9,6,3)",
    )
    stf.add_argument("--experts", type=int, default=1, metavar="E", help="tokens per window (default: %(default)s)")
    stf.set_defaults(run=_run_stf, fail=stf.error)


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise ValueError(f"numbers with commas between them are needed, not {text!r}") from error


def _run_stf(args: argparse.Namespace, rest: list[str]) -> None:
    from foldserve.server.convert import stf
    from foldserve.server.convert.source import ConversionError

    try:
        layers = {"layers": args.layers} if args.layers else {}
        path = stf.convert(args.source, args.target, vision_tower=args.vision_tower, experts=args.experts, **layers)
    except (ConversionError, FileExistsError) as error:
        args.fail(str(error))
    print(f"Wrote {path}.\nServe it: foldserve serve {path}")
