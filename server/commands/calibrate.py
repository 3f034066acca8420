"""`foldserve calibrate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from foldserve.server.commands.arguments import Commands
from foldserve.server.settings import Environment

_DESCRIPTION = """\
Finds the first decoder layer K at which vision tokens may leave: the first whose mean KL(P_withdrawn || P_full) over
the samples, over the answer's first tokens, in nats, is at most eta (VTW, Algorithm 1). Writes withdrawal.json, which
`foldserve serve MODEL --withdraw-layer auto` reads, and a plot. Exit status 1: no K is good enough.

MODEL is a Hugging Face name or a local directory and comes first. Engine options of `vllm serve` work here too.
"""


def add(commands: Commands) -> None:
    """Declares the command."""
    calibrate = commands.add_parser(
        "calibrate",
        help="find the withdrawal layer of a model",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = calibrate.add_argument
    add("model", metavar="MODEL")
    add(
        "--data",
        type=Path,
        metavar="DIR|JSONL",
        help='images, each with its question in a .txt file or none, or lines {"image": path, "question": text} '
        "(default: built-in scenes, which the demo model knows)",
    )
    add("--eta", type=float, default=0.003, help="largest mean KL accepted, in nats (default: %(default)s)")
    add("--samples", type=int, default=20, metavar="N", help="pairs to take from the data (default: %(default)s)")
    add(
        "--answer-tokens",
        type=int,
        default=32,
        metavar="N",
        help="a sample's KL is the mean over so many tokens of the model's own answer; 1: its first, as in the paper "
        "(default: %(default)s)",
    )
    add("--min-layer", type=int, default=5, metavar="K", help="first K to look at (default: %(default)s)")
    add(
        "--question",
        default="Describe this image in detail.",
        metavar="TEXT",
        help='asked of images that bring none (default: "%(default)s")',
    )
    add("--output", type=Path, metavar="FILE", help="(default: withdrawal.json in a local MODEL, else in the cache)")
    add("--plot", type=Path, metavar="FILE", help="(default: the output's name with .png)")
    calibrate.set_defaults(run=_run, takes_engine_options=True, fail=calibrate.error)


def _run(args: argparse.Namespace, rest: list[str]) -> None:
    from foldserve.server.quality.calibration_command import Options, run

    names = ("model", "data", "eta", "samples", "answer_tokens", "min_layer", "question", "output", "plot")
    try:
        status = run(Options(**{name: getattr(args, name) for name in names}), Environment.read().cache_dir, rest)
    except ValueError as error:
        args.fail(str(error))
    if status:
        raise SystemExit(status)
