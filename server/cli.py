"""The `foldserve` command: arguments -> `Settings` -> one call."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

from foldserve.server.settings import Environment, Settings, parse_reduction

_T = TypeVar("_T")

_DESCRIPTION = """\
Serve vision-language models with fewer vision tokens: every request chooses how many.

  foldserve serve                               the small demo model on port 8000
  foldserve serve llava-hf/llava-1.5-7b-hf      a real model
  foldserve demo-model DIR                      write the demo model to a directory
"""

_SERVE_DESCRIPTION = """\
Starts vLLM's OpenAI-compatible server with per-request vision-token reduction.

MODEL is a Hugging Face name or a local directory and comes first. Without it a small model is made and served: its
weights are random, so it answers nonsense, but everything else is real.

Every option of `vllm serve` works here too: --help=all lists them, --help=WORD searches them.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command that `argv` (by default the process's arguments) names."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.run is not _serve:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.run(args, rest)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "foldserve", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=_versions())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_serve(commands)
    _add_demo_model(commands)
    return parser


def _add_serve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    defaults = Settings()
    serve = commands.add_parser(
        "serve",
        help="start the server",
        usage="foldserve serve [MODEL] [options] [any option of vllm serve]",
        description=_SERVE_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    serve.add_argument("-h", "--help", nargs="?", const="", metavar="WORD", help="show this; with WORD, vLLM's options")
    serve.add_argument(
        "--default-reduction",
        type=_argument(parse_reduction),
        default=defaults.default_reduction,
        metavar="JSON|RATIO",
        help="for requests that say nothing: a ratio in [0, 1), or a request's `reduction` object (default: none)",
    )
    serve.add_argument(
        "--low-detail-ratio",
        type=float,
        default=defaults.low_detail_ratio,
        metavar="RATIO",
        help='reduction ratio of images sent with "detail": "low" (default: %(default)s)',
    )
    serve.add_argument(
        "--withdraw-layer",
        type=int,
        metavar="K",
        help="first decoder layer without vision tokens, for requests that withdraw them (default: off)",
    )
    serve.set_defaults(run=_serve, usage=serve.format_help, fail=serve.error)


def _add_demo_model(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser("demo-model", help="write the demo model")
    demo.add_argument("directory", type=Path, metavar="DIR", help="a directory that does not exist yet")
    demo.add_argument("--seed", type=int, default=0, help="other weights for each seed (default: %(default)s)")
    demo.set_defaults(run=_demo_model, fail=demo.error)


def _serve(args: argparse.Namespace, rest: list[str]) -> None:
    if args.help == "":
        print(args.usage(), end="")
        return
    if args.help:
        rest = [*rest, f"--help={args.help}"]
    try:
        settings = Settings(args.default_reduction, args.low_detail_ratio, args.withdraw_layer)
    except ValueError as error:
        args.fail(str(error))
    environment = Environment.read()

    from foldserve.server.api import launch
    from foldserve.server.quality import demo_model

    launch.serve(rest, settings, environment, lambda: demo_model.cached(environment.cache_dir))


def _demo_model(args: argparse.Namespace, rest: list[str]) -> None:
    from foldserve.server.quality import demo_model

    try:
        path = demo_model.create(args.directory, seed=args.seed)
    except FileExistsError as error:
        args.fail(str(error))
    print(f"Wrote {path}. {demo_model.NOTICE}\nServe it: foldserve serve {path}")


def _argument(parse: Callable[[str], _T]) -> Callable[[str], _T]:
    """`parse` as argparse wants it: so that the message of its ValueError is shown."""

    def parse_argument(text: str) -> _T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse_argument


def _versions() -> str:
    try:
        vllm = f"vLLM {version('vllm')}"
    except PackageNotFoundError:
        vllm = "vLLM is not installed"
    return f"foldserve {version('foldserve')} ({vllm})"


if __name__ == "__main__":
    main()
