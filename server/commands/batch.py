"""`foldserve batch`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from foldserve.server.api.batch.options import BatchOptions, Existing
from foldserve.server.commands.parser import describe
from foldserve.server.commands.serve import declare_batch_options, help_or_rest, read_settings
from foldserve.server.settings import Environment

_DESCRIPTION = """\
Answers a file of requests in OpenAI's batch format, one a line, without a server: the same checks, plans, refusals and
`usage.vision_tokens` as over HTTP. --resume continues a killed run; the output has exactly one line for each line of
the input. docs/guides/batch.md says more.

MODEL is a Hugging Face name or a local directory (default: the small demo model). Every option of `vllm serve` that is
the engine's works here too: --help=all lists them, --help=WORD searches them.
"""


def add(parser: ArgumentParser) -> None:
    describe(parser, _DESCRIPTION)
    group = parser.add_argument_group("files")
    group.add_argument("-i", "--input", type=Path, metavar="FILE", help="requests, one JSON object a line")
    group.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="the results, in the order in which they are ready"
    )
    again = group.add_mutually_exclusive_group()
    again.add_argument(
        "--resume",
        action="store_true",
        help="answer the lines that FILE has no result for; all, if there is no FILE",
    )
    again.add_argument("--overwrite", action="store_true", help="begin anew, whatever results FILE holds")
    group.add_argument(
        "--concurrency", type=int, metavar="N", help="requests in flight (default: a quarter more than the engine runs)"
    )
    declare_batch_options(parser)
    parser.set_defaults(run=_run)


def _run(args: Namespace, rest: list[str]) -> None:
    argv = help_or_rest(args, rest)
    if argv is None:
        return
    try:
        options = _options(args)
        environment = Environment.read()
        settings = read_settings(args, environment)
    except ValueError as error:
        args.fail(str(error))
    from foldserve.server.api.logs.config import shared_logging_config
    from foldserve.server.quality.demo.checkpoint import CHECKPOINT

    level = args.log_level or environment.log_level or ("INFO" if args.verbose else "WARNING")  # no line per request
    with shared_logging_config(args.log_format, level, verbose=args.verbose, own=environment.own_logging):
        from foldserve.server.api.batch.run import batch  # imports vllm, which looks at once how to log

        try:
            batch(argv, options, settings, environment, CHECKPOINT)
        except (ValueError, OSError) as error:  # CannotStart too
            args.fail(str(error))


def _options(args: Namespace) -> BatchOptions:
    if args.input is None or args.output is None:
        raise ValueError("give both files: -i requests.jsonl -o results.jsonl")
    existing: Existing = "resume" if args.resume else "overwrite" if args.overwrite else "refuse"
    return BatchOptions(args.input, args.output, existing, args.concurrency)
