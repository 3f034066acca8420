"""`foldserve serve`."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace, _ArgumentGroup
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

from foldserve.server.access import UNBOUNDED_QUEUE, Access
from foldserve.server.commands.parser import add_options, argument, describe, read_options
from foldserve.server.limits import Limits
from foldserve.server.settings import Environment, Settings, parse_withdraw_layer

_DESCRIPTION = """\
Starts vLLM's OpenAI-compatible server with per-request vision-token reduction.

MODEL is a Hugging Face name or a local directory and comes first. Without it a small model is served that foldserve
brings along: it answers questions about drawn scenes of coloured shapes and numbers (docs/explanation/demo-model.md).

Every option of `vllm serve` works here too: --help=all lists them, --help=WORD searches them.
"""


_RUNNERS = {"v1": "0", "v2": "1"}  # values of `VLLM_USE_V2_MODEL_RUNNER`
_WHERE_IT_WRITES = Path()
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def add(parser: ArgumentParser) -> None:
    describe(parser, _DESCRIPTION)
    declare_options(parser, "serve")
    parser.set_defaults(run=_run)


def declare_options(parser: ArgumentParser, command: str) -> None:
    """Declares the options of a command that takes all arguments of a server."""
    _declare_engine(parser, command)
    access = parser.add_argument_group("access and life cycle", "docs/guides/lifecycle.md")
    add_options(access, Access)
    _declare_logs(access)


def _declare_engine(parser: ArgumentParser, command: str) -> None:
    """Declares the options about the engine and the limits of one request."""
    parser.usage = f"foldserve {command} [MODEL] [options] [any option of vllm serve]"
    parser.add_argument(
        "-h", "--help", nargs="?", const="", metavar="WORD", help="show this; with WORD, vLLM's options"
    )
    add_options(parser, Settings)
    parser.add_argument(
        "--withdraw-layer",
        type=argument(parse_withdraw_layer),
        metavar="K|auto",
        help="first decoder layer without vision tokens, for requests that withdraw them; auto: the one that "
        "`foldserve calibrate` found (default: off)",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="what --withdraw-layer auto reads (default: where `foldserve calibrate MODEL` writes)",
    )
    parser.add_argument(
        "--auto",
        type=Path,
        nargs="?",
        const=_WHERE_IT_WRITES,
        metavar="FILE",
        help='serve requests with "ratio": "auto" by what `foldserve calibrate --auto` wrote, into FILE or to its '
        "default place (default: off)",
    )
    parser.add_argument(
        "--model-runner",
        choices=("auto", *_RUNNERS),
        default="auto",
        help="vLLM's model runner; auto: its own choice, which is v2 on a GPU and v1 on a CPU (default: auto)",
    )
    limits = parser.add_argument_group("limits of one request", "docs/guides/security.md says what each is good for")
    add_options(limits, Limits)
    parser.set_defaults(takes_engine_options=True, usage=parser.format_help, fail=parser.error)


def declare_batch_options(parser: ArgumentParser) -> None:
    """Declares the options of a command that answers requests without a listening server."""
    _declare_engine(parser, "batch")
    group = parser.add_argument_group("life cycle and logs")
    add_options(group, Access, only=("engine_timeout_s",))
    _declare_logs(group)
    nobody = dict.fromkeys(field.name for field in fields(Access))
    parser.set_defaults(**nobody | {"max_queue": UNBOUNDED_QUEUE})


def _declare_logs(group: _ArgumentGroup) -> None:
    group.add_argument(
        "--log-format", choices=("text", "json"), default="text", help="of standard output (default: %(default)s)"
    )
    group.add_argument(
        "--log-level",
        choices=_LEVELS,
        help="of all lines (default: VLLM_LOGGING_LEVEL, or else INFO; of vLLM's own WARNING in text)",
    )
    group.add_argument(
        "--verbose", action="store_true", help="vLLM's own lines too: arguments, routes, throughput every 10 s"
    )


def _access(args: Namespace) -> Access:
    access = read_options(Access, args)
    if access.api_keys is not None:
        from foldserve.server.api.auth.keys import read_keys

        read_keys(access.api_keys)  # the API processes read it again: a mistake shows here, before the model is loaded
    return access


def read_settings(args: Namespace, environment: Environment) -> Settings | Callable[[str, str | None], Settings]:
    """The settings, or a function that computes them from the model. Passes the model runner to vLLM by its variable.

    Raises ValueError for options that don't go together, or with the environment.
    """
    if environment.own_logging and (args.log_format != "text" or args.log_level or args.verbose):
        raise ValueError("--log-format, --log-level and --verbose exclude a logging configuration of your own")
    calibrated = args.withdraw_layer == "auto"
    if args.calibration is not None and not calibrated:
        raise ValueError("--calibration is what --withdraw-layer auto reads: give both or none")
    settings = read_options(
        Settings,
        args,
        withdraw_layer=None if calibrated else args.withdraw_layer,
        limits=read_options(Limits, args),
        access=_access(args),
    )
    if args.model_runner in _RUNNERS:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = _RUNNERS[args.model_runner]
    if not calibrated and args.auto is None:
        return settings
    return _calibrated(settings, args.calibration, args.auto, environment, layer=calibrated)


def help_or_rest(args: Namespace, rest: list[str]) -> list[str] | None:
    """vLLM's arguments, with `--help=WORD` if given. None if a plain `--help` was given, which is then answered."""
    if args.help == "":
        print(args.usage(), end="")
        return None
    return [*rest, f"--help={args.help}"] if args.help else rest


def _run(args: Namespace, rest: list[str]) -> None:
    argv = help_or_rest(args, rest)
    if argv is None:
        return
    try:
        environment = Environment.read()
        settings = read_settings(args, environment)
    except ValueError as error:
        args.fail(str(error))
    from foldserve.server.api.logs.config import shared_logging_config
    from foldserve.server.quality.demo.checkpoint import CHECKPOINT

    level = args.log_level or environment.log_level
    with shared_logging_config(args.log_format, level, verbose=args.verbose, own=environment.own_logging):
        from foldserve.server.api import launch, preflight  # import vllm, which sets up its logging at once

        try:
            launch.serve(argv, settings, environment, CHECKPOINT)
        except preflight.CannotStart as error:
            args.fail(str(error))


def _calibrated(
    base: Settings, layer_file: Path | None, auto_file: Path | None, environment: Environment, *, layer: bool
) -> Callable[[str, str | None], Settings]:
    """Settings as a function of a model and its revision, which only vLLM's parser can read from the options.

    `layer`: use the calibrated K. Without `auto_file`, requests with `ratio: "auto"` are refused.
    """
    from foldserve.server.quality import calibration_file
    from foldserve.server.quality.auto import file as auto

    def settings(model: str, revision: str | None) -> Settings:
        found = base
        if layer:
            file = layer_file or calibration_file.default_file(model, environment.cache_dir)
            calibration = calibration_file.read_for(model, revision, file)
            found = replace(found, withdraw_layer=calibration.withdraw_layer, calibration=calibration.summary())
        if auto_file is not None:
            file = auto.default_file(model, environment.cache_dir) if auto_file == _WHERE_IT_WRITES else auto_file
            found = replace(found, auto=auto.read_for(model, revision, file).policy())
        return found

    return settings
