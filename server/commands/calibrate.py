"""`foldserve calibrate`."""

from __future__ import annotations

from argparse import ArgumentParser

from foldserve.server.commands.parser import declare
from foldserve.server.quality.calibration_options import CalibrationOptions

_DESCRIPTION = """\
Finds the first decoder layer K at which vision tokens may leave: the first whose mean KL(P_withdrawn || P_full) over
the samples, over the answer's first tokens, in nats, is at most eta (VTW, Algorithm 1). Writes withdrawal.json, which
`foldserve serve MODEL --withdraw-layer auto` reads, and a plot. Exit status 1: no K is good enough.

With --auto it finds how few vision tokens each group of requests needs instead: the smallest count at which, by
conformal risk control, at most --target of the answers change. Writes auto.json, which `foldserve serve MODEL` reads
for requests with "ratio": "auto", and a page. Exit status 1: no group can be reduced.

MODEL is a Hugging Face name or a local directory and comes first. Engine options of `vllm serve` work here too.
"""


def add(parser: ArgumentParser) -> None:
    declare(parser, CalibrationOptions, _run, _DESCRIPTION, takes_engine_options=True)


def _run(options: CalibrationOptions, rest: list[str]) -> None:
    from foldserve.server.settings import Environment

    if options.auto:
        from foldserve.server.quality.auto.command import run
    else:
        from foldserve.server.quality.calibration_command import run
    if status := run(options, Environment.read().cache_dir, rest):
        raise SystemExit(status)
