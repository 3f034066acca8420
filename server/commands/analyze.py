"""`foldserve analyze`."""

from __future__ import annotations

from argparse import ArgumentParser

from foldserve.server.commands.parser import declare
from foldserve.server.quality.analysis.options import AnalysisOptions

_DESCRIPTION = """\
Shows, without labels, where a model can do with fewer vision tokens: how much of the tower's energy few tokens can hold
after each block, how far the tower's output moves when tokens are merged in each block, and how much attention each
decoder layer pays to the image. docs/guides/evaluation.md says how to read it.

MODEL is a Hugging Face name or a local directory and comes first. Engine options of `vllm serve` work here too.
"""


def add(parser: ArgumentParser) -> None:
    declare(parser, AnalysisOptions, _run, _DESCRIPTION, takes_engine_options=True)


def _run(options: AnalysisOptions, rest: list[str]) -> None:
    from foldserve.server.quality.analysis.command import run

    run(options, rest)
