"""`foldserve map`."""

from __future__ import annotations

from argparse import ArgumentParser

from foldserve.server.commands.parser import declare
from foldserve.server.quality.maps.options import MapOptions

_DESCRIPTION = """\
Draws over an image where its vision tokens go: those that become one share a colour and an outline, dropped ones are
dim. The model's own tower and reducers decide, in an engine that is started for it; `foldserve serve` has the same at
POST /v1/reductions/map, and on the page /playground. docs/guides/playground.md says how to read it.

Engine options of `vllm serve` work here too.
"""


def add(parser: ArgumentParser) -> None:
    declare(parser, MapOptions, _run, _DESCRIPTION, takes_engine_options=True)


def _run(options: MapOptions, rest: list[str]) -> None:
    from foldserve.server.quality.demo.checkpoint import CHECKPOINT
    from foldserve.server.quality.maps.command import run

    run(options, CHECKPOINT, rest)
