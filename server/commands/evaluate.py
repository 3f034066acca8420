"""`foldserve evaluate`."""

from __future__ import annotations

from argparse import ArgumentParser

from foldserve.server.commands.parser import declare
from foldserve.server.quality.evaluation.options import EvaluationOptions

_DESCRIPTION = """\
Asks a model questions about images, through the engine that serves it, under every method and amount, and writes a
quality card: accuracy by kind of question, KL of the first answer token and agreement with ratio 0, all against the
vision tokens that a decoder layer sees. The controls random and downsample are always measured at the same counts.
What the output folder holds already is not measured again. docs/guides/evaluation.md says how to read it.

MODEL is a Hugging Face name or a local directory and comes first. Engine options of `vllm serve` work here too.
"""


def add(parser: ArgumentParser) -> None:
    declare(parser, EvaluationOptions, _run, _DESCRIPTION, takes_engine_options=True)


def _run(options: EvaluationOptions, rest: list[str]) -> None:
    from foldserve.server.quality.evaluation.command import run

    run(options, rest)
