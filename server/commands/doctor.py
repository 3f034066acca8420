"""`foldserve doctor`."""

from __future__ import annotations

import json
import logging
import os
import sys
from argparse import ArgumentParser, Namespace
from contextlib import nullcontext, redirect_stdout
from typing import TYPE_CHECKING

from foldserve.server.commands.parser import describe
from foldserve.server.commands.serve import declare_options, help_or_rest, read_settings
from foldserve.server.settings import Environment

if TYPE_CHECKING:
    from foldserve.server.api.doctor.report import DoctorReport

_DESCRIPTION = """\
Says in seconds whether and how `foldserve serve` with the same arguments would run here. Needs no GPU and loads no
weights: vLLM resolves its configuration as it would for the server. Status 0 if a server would start, 1 if not.
"""


def add(parser: ArgumentParser) -> None:
    describe(parser, _DESCRIPTION)
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    declare_options(parser, "doctor")
    parser.set_defaults(run=_run)


def _run(args: Namespace, rest: list[str]) -> None:
    argv = help_or_rest(args, rest)
    if argv is None:
        return
    if not args.verbose:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")  # the table says what vLLM's lines would
        logging.getLogger("vllm").addHandler(logging.NullHandler())  # and it warns before it reads that
    with nullcontext() if args.help else redirect_stdout(sys.stderr):  # where vLLM logs in spite of that
        report = _report(args, argv)
    if args.json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        from foldserve.server.api.doctor.table import table

        print(table(report))
    sys.exit(0 if report.can_start else 1)


def _report(args: Namespace, rest: list[str]) -> DoctorReport:
    from foldserve.server.api.doctor.report import DoctorReport, Problem
    from foldserve.server.api.doctor.versions import Versions

    versions = Versions.read()
    if versions.problem is not None:  # nothing else can be imported
        return DoctorReport((Problem(versions.problem),), versions)
    from foldserve.server.api.doctor.examine import examine
    from foldserve.server.quality.demo.checkpoint import CHECKPOINT

    try:
        environment = Environment.read()
        return examine(rest, read_settings(args, environment), environment, CHECKPOINT, args.model_runner)
    except ValueError as error:
        return DoctorReport((Problem(str(error)),), versions)
