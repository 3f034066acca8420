"""The `foldserve` command: arguments -> `Settings` -> one call."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

from foldserve.server.settings import Environment, Settings, parse_reduction, parse_withdraw_layer

_T = TypeVar("_T")

_DESCRIPTION = """\
Serve vision-language models with fewer vision tokens: every request chooses how many.

  foldserve serve                               the small demo model on port 8000
  foldserve serve llava-hf/llava-1.5-7b-hf      a real model
  foldserve calibrate MODEL --data DIR          find the layer where vision tokens may be withdrawn
  foldserve demo-model DIR                      write the demo model to a directory
"""

_SERVE_DESCRIPTION = """\
Starts vLLM's OpenAI-compatible server with per-request vision-token reduction.

MODEL is a Hugging Face name or a local directory and comes first. Without it a small model is made and served: its
weights are random, so it answers nonsense, but everything else is real.

Every option of `vllm serve` works here too: --help=all lists them, --help=WORD searches them.
"""

_CALIBRATE_DESCRIPTION = """\
Finds the first decoder layer K at which vision tokens may leave: the first whose mean KL(P_withdrawn || P_full) over
the samples, of the answer's first token, in nats, is at most eta (VTW, Algorithm 1). Writes withdrawal.json, which
`foldserve serve MODEL --withdraw-layer auto` reads, and a plot. Exit status 1: no K is good enough.

MODEL is a Hugging Face name or a local directory and comes first. Engine options of `vllm serve` work here too.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command that `argv` (by default the process's arguments) names."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.run is _demo_model:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.run(args, rest)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "foldserve", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=_versions())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_serve(commands)
    _add_calibrate(commands)
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
        type=_argument(parse_withdraw_layer),
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
    serve.set_defaults(run=_serve, usage=serve.format_help, fail=serve.error)


def _add_calibrate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    calibrate = commands.add_parser(
        "calibrate",
        help="find the withdrawal layer of a model",
        description=_CALIBRATE_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = calibrate.add_argument
    add("model", metavar="MODEL")
    add(
        "--data",
        type=Path,
        required=True,
        metavar="DIR|JSONL",
        help='images, each with its question in a .txt file or none, or lines {"image": path, "question": text}',
    )
    add("--eta", type=float, default=0.003, help="largest mean KL accepted, in nats (default: %(default)s)")
    add("--samples", type=int, default=20, metavar="N", help="pairs to take from the data (default: %(default)s)")
    add("--min-layer", type=int, default=5, metavar="K", help="first K to look at (default: %(default)s)")
    add(
        "--question",
        default="Describe this image in detail.",
        metavar="TEXT",
        help='asked of images that bring none (default: "%(default)s")',
    )
    add("--output", type=Path, metavar="FILE", help="(default: withdrawal.json in a local MODEL, else in the cache)")
    add("--plot", type=Path, metavar="FILE", help="(default: the output's name with .png)")
    calibrate.set_defaults(run=_calibrate, fail=calibrate.error)


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


def _calibrate(args: argparse.Namespace, rest: list[str]) -> None:
    from foldserve.server.quality.calibration_command import Options, run

    names = ("model", "data", "eta", "samples", "min_layer", "question", "output", "plot")
    try:
        status = run(Options(**{name: getattr(args, name) for name in names}), Environment.read().cache_dir, rest)
    except ValueError as error:
        args.fail(str(error))
    if status:
        raise SystemExit(status)


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
