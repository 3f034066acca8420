"""`foldserve serve`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

from foldserve.server.access import Access
from foldserve.server.commands.arguments import Commands, argument
from foldserve.server.limits import Limits, option
from foldserve.server.settings import Environment, Settings, parse_reduction, parse_withdraw_layer

_DESCRIPTION = """\
Starts vLLM's OpenAI-compatible server with per-request vision-token reduction.

MODEL is a Hugging Face name or a local directory and comes first. Without it a small model is served that foldserve
brings along: it answers questions about drawn scenes of coloured shapes and numbers (docs/demo-model.md).

Every option of `vllm serve` works here too: --help=all lists them, --help=WORD searches them.
"""


_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


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
        "--positions",
        choices=("renumber", "keep"),
        default=defaults.positions,
        help="rotary positions of the vision tokens that stay, for requests that do not say (default: %(default)s)",
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
    _add_limits(serve)
    _add_access(serve)
    serve.set_defaults(run=_run, takes_engine_options=True, usage=serve.format_help, fail=serve.error)


def _add_limits(serve: argparse.ArgumentParser) -> None:
    """One option per field of `Limits`."""
    group = serve.add_argument_group("limits of one request", "docs/security.md says what each is good for")
    for limit in fields(Limits):
        help = limit.metadata["help"]
        if "choices" in limit.metadata:
            choices = limit.metadata["choices"]
            text = f"{help} (default: %(default)s)"
            group.add_argument(option(limit.name), choices=choices, default=limit.default, help=text)
        elif limit.default == ():
            group.add_argument(option(limit.name), action="append", default=[], metavar="NAME", help=help)
        else:
            kind = int if limit.type == "int" else float  # the annotation, as text
            group.add_argument(
                option(limit.name), type=kind, default=limit.default, metavar="N", help=f"{help} (default: %(default)s)"
            )


def _add_access(serve: argparse.ArgumentParser) -> None:
    defaults = Access()
    add = serve.add_argument_group("access and life cycle", "docs/lifecycle.md").add_argument
    add("--api-keys", type=Path, metavar="FILE", help="keys that may ask, see `foldserve hash-key` (default: all may)")
    add(
        "--open-metrics",
        action="store_true",
        help="/metrics needs no key (default: with --api-keys, one with the scope `metrics`)",
    )
    add(
        "--max-queue",
        type=int,
        default=defaults.max_queue,
        metavar="N",
        help="answers that may wait beside those the engine runs; more are told to come later (default: %(default)s)",
    )
    add(
        "--key-concurrent",
        type=int,
        metavar="N",
        help="answers that a key may have in flight whose entry says nothing (default: half of what the server holds)",
    )
    add(
        "--shutdown-timeout",
        type=int,
        default=defaults.shutdown_timeout_s,
        metavar="S",
        help="seconds that requests in flight have to finish after SIGTERM (default: %(default)s)",
    )
    add(
        "--engine-timeout",
        type=int,
        default=defaults.engine_timeout_s,
        metavar="S",
        help="seconds without output of an engine that has work, after which it counts as hung and the server ends; "
        "more than its longest step (default: %(default)s)",
    )
    add("--log-format", choices=("text", "json"), default="text", help="of standard output (default: %(default)s)")
    add(
        "--log-level",
        choices=_LEVELS,
        help="of all lines (default: VLLM_LOGGING_LEVEL, or else INFO; of vLLM's own WARNING in text)",
    )
    add("--verbose", action="store_true", help="vLLM's own lines too: arguments, routes, throughput every 10 s")


def _access(args: argparse.Namespace) -> Access:
    path = args.api_keys
    if path is not None:
        from foldserve.server.api.auth.keys import read_keys

        read_keys(path)  # the API processes read it again: here a mistake shows before the model is loaded
    return Access(
        api_keys=path and path.absolute(),
        open_metrics=args.open_metrics,
        max_queue=args.max_queue,
        key_concurrent=args.key_concurrent,
        shutdown_timeout_s=args.shutdown_timeout,
        engine_timeout_s=args.engine_timeout,
    )


def _limits(args: argparse.Namespace) -> Limits:
    return Limits.from_config({limit.name: getattr(args, limit.name) for limit in fields(Limits)})


def _run(args: argparse.Namespace, rest: list[str]) -> None:
    if args.help == "":
        print(args.usage(), end="")
        return
    if args.help:
        rest = [*rest, f"--help={args.help}"]
    settings: Settings | Callable[[str, str | None], Settings]
    try:
        environment = Environment.read()
        if environment.own_logging and (args.log_format != "text" or args.log_level or args.verbose):
            raise ValueError("--log-format, --log-level and --verbose exclude a logging configuration of your own")
        calibrated = args.withdraw_layer == "auto"
        if args.calibration is not None and not calibrated:
            raise ValueError("--calibration is what --withdraw-layer auto reads: give both or none")
        settings = Settings(
            args.default_reduction,
            args.low_detail_ratio,
            None if calibrated else args.withdraw_layer,
            limits=_limits(args),
            access=_access(args),
            positions=args.positions,
        )
        if calibrated:
            settings = _calibrated(settings, args.calibration, environment)
    except ValueError as error:
        args.fail(str(error))

    from foldserve.server.api.logs.config import configured
    from foldserve.server.quality.demo.checkpoint import CHECKPOINT

    level = args.log_level or environment.log_level
    with configured(args.log_format, level, verbose=args.verbose, own=environment.own_logging):
        from foldserve.server.api import launch, preflight  # import vllm, which looks at once how to log

        try:
            launch.serve(rest, settings, environment, CHECKPOINT)
        except preflight.CannotStart as error:
            args.fail(str(error))


def _calibrated(base: Settings, file: Path | None, environment: Environment) -> Callable[[str, str | None], Settings]:
    """Settings for a model and its revision, which only vLLM's parser can tell from its options."""
    from foldserve.server.quality.calibration_file import default_file, read_for

    def settings(model: str, revision: str | None) -> Settings:
        found = read_for(model, revision, file or default_file(model, environment.cache_dir))
        return replace(base, withdraw_layer=found.withdraw_layer, calibration=found.summary())

    return settings
