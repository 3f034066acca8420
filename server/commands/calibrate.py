"""`foldserve calibrate`."""

from __future__ import annotations

from argparse import ArgumentParser

from foldserve.server.commands.parser import declare
from foldserve.server.quality.calibration_options import CalibrationOptions

_DESCRIPTION = """\
Finds the first decoder layer K at which vision tokens may leave: the first whose mean KL(P_withdrawn || P_full) over
the samples, over the answer's first tokens, in nats, is at most eta (VTW, Algorithm 1). Writes withdrawal.json, which
`foldserve serve MODEL --withdraw-layer auto` reads, and a plot. Exit status 1: no K is good enough.

MODEL is a Hugging Face name or a local directory and comes first. Engine options of `vllm serve` work here too.
"""


def add(parser: ArgumentParser) -> None:
    declare(parser, CalibrationOptions, _run, _DESCRIPTION, takes_engine_options=True)


def _run(options: CalibrationOptions, rest: list[str]) -> None:
    from foldserve.server.quality.calibration_command import run
    from foldserve.server.settings import Environment

    if status := run(options, Environment.read().cache_dir, rest):
        raise SystemExit(status)
