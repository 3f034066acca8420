"""`foldserve serve`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from foldserve.server.commands.arguments import Commands, argument
from foldserve.server.settings import Environment, Settings, parse_reduction, parse_withdraw_layer

_DESCRIPTION = """\
Starts vLLM's OpenAI-compatible server with per-request vision-token reduction.

MODEL is a Hugging Face name or a local directory and comes first. Without it a small model is made and served: its
weights are random, so it answers nonsense, but everything else is real.

Every option of `vllm serve` works here too: --help=all lists them, --help=WORD searches them.
"""


def add(commands: Commands) -> None:
    """Declares the command."""
    defaults = Settings()
    serve = commands.add_parser(
        "serve",
        help="start the server",
        usage="foldserve serve [MODEL] [options] [any option of vllm serve]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    serve.add_argument("-h", "--help", nargs="?", const="", metavar="WORD", help="show this; with WORD, vLLM's options")
    serve.add_argument(
        "--default-reduction",
        type=argument(parse_reduction),
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
        type=argument(parse_withdraw_layer),
        metavar="K|auto",
        help="first decoder layer without vision tokens, for requests that withdraw them; auto: the one that "
        "`foldserve calibrate` found (default: off)",
    )
    serve.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="what --withdraw-layer auto reads (default: where `foldserve calibrate MODEL` writes)",
    )
    serve.set_defaults(run=_run, takes_engine_options=True, usage=serve.format_help, fail=serve.error)


def _run(args: argparse.Namespace, rest: list[str]) -> None:
    if args.help == "":
        print(args.usage(), end="")
        return
    if args.help:
        rest = [*rest, f"--help={args.help}"]
    environment = Environment.read()
    settings: Settings | Callable[[str, str | None], Settings]
    try:
        if args.withdraw_layer == "auto":
            settings = _calibrated_settings(args, environment)
        elif args.calibration is not None:
            raise ValueError("--calibration is what --withdraw-layer auto reads: give both or none")
        else:
            settings = Settings(args.default_reduction, args.low_detail_ratio, args.withdraw_layer)
    except ValueError as error:
        args.fail(str(error))

    from foldserve.server.api import launch
    from foldserve.server.quality import demo_model

    launch.serve(rest, settings, environment, lambda: demo_model.cached(environment.cache_dir))


def _calibrated_settings(args: argparse.Namespace, environment: Environment) -> Callable[[str, str | None], Settings]:
    """Settings for a model and its revision, which only vLLM's parser can tell from its options."""
    from foldserve.server.quality.calibration_file import default_file, read_for

    def settings(model: str, revision: str | None) -> Settings:
        found = read_for(model, revision, args.calibration or default_file(model, environment.cache_dir))
        return Settings(args.default_reduction, args.low_detail_ratio, found.withdraw_layer, found.summary())

    return settings
