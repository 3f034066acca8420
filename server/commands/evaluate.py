"""`foldserve evaluate`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from foldserve.server.commands.arguments import Commands, argument

_T = TypeVar("_T")

_DESCRIPTION = """\
Asks a model questions about images, through the engine that serves it, under every method and amount, and writes a
quality card: accuracy by kind of question, KL of the first answer token and agreement with ratio 0, all against the
vision tokens that a decoder layer sees. The controls random and downsample are always measured at the same counts.
What the output folder holds already is not measured again. docs/evaluation.md says how to read it.

MODEL is a Hugging Face name or a local directory and comes first. Engine options of `vllm serve` work here too.
"""


def add(commands: Commands) -> None:
    """Declares the command."""
    evaluate = commands.add_parser(
        "evaluate",
        help="measure accuracy against vision tokens",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = evaluate.add_argument
    add("model", metavar="MODEL")
    add(
        "--methods",
        nargs="+",
        default=[],
        metavar="METHOD",
        help="names, name:option=value, a+b with b in the decoder, or JSON as in a request (default: all there are)",
    )
    add(
        "--ratios",
        type=argument(_ratios),
        default=(0, 0.25, 0.5, 0.66, 0.75, 0.9),
        metavar="R,R,...",
        help="shares of vision tokens removed (default: 0,0.25,0.5,0.66,0.75,0.9)",
    )
    add(
        "--withdraw",
        type=argument(_layers),
        default=(),
        metavar="K,K,...",
        help="withdrawal layers; the engine is started once for each (default: none)",
    )
    add(
        "--data",
        type=Path,
        metavar="DIR|JSONL",
        help='lines {"image": path, "question": text, "answer": text or list, "kind": text}, or a folder of images, '
        "as calibrate takes it (default: built-in scenes, which the demo model knows)",
    )
    add("--limit", type=int, default=600, metavar="N", help="questions to take from the data (default: %(default)s)")
    add(
        "--question",
        default="Describe this image in detail.",
        metavar="TEXT",
        help='asked of images that bring none (default: "%(default)s")',
    )
    add("--max-tokens", type=int, default=96, metavar="N", help="longest answer (default: %(default)s)")
    add("--batch", type=int, default=64, metavar="N", help="questions handed over at once (default: %(default)s)")
    add("--output", type=Path, default=Path("quality"), metavar="DIR", help="(default: %(default)s)")
    add("--card", type=Path, metavar="FILE", help="(default: quality.json in a local MODEL, which /v1/reducers shows)")
    evaluate.set_defaults(run=_run, takes_engine_options=True, fail=evaluate.error)


def _ratios(text: str) -> tuple[float, ...]:
    return _each(text, float, "ratios such as 0,0.5,0.75")


def _layers(text: str) -> tuple[int, ...]:
    return _each(text, int, "decoder layers such as 4,8")


def _each(text: str, kind: Callable[[str], _T], what: str) -> tuple[_T, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{what} are needed, not {text!r}") from error


def _run(args: argparse.Namespace, rest: list[str]) -> None:
    from foldserve.server.quality.evaluation.command import Options, run

    names = ("model", "withdraw", "data", "limit", "question", "max_tokens", "batch", "output", "card")
    fields = {name: getattr(args, name) for name in names}
    try:
        run(Options(methods=tuple(args.methods), ratios=tuple(args.ratios), **fields), rest)
    except ValueError as error:
        args.fail(str(error))
