"""`foldserve demo-model`."""

from __future__ import annotations

from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path

from foldserve.server.commands.parser import declare
from foldserve.server.options import positional


@dataclass(frozen=True, slots=True)
class DemoModelOptions:
    directory: Path = positional("DIR", "a directory that does not exist yet")


def add(parser: ArgumentParser) -> None:
    declare(parser, DemoModelOptions, _run)


def _run(options: DemoModelOptions, rest: list[str]) -> None:
    from foldserve.server.quality.demo.checkpoint import copy_checkpoint

    copy_checkpoint(options.directory)
    print(f"Wrote {options.directory}. Serve it: foldserve serve {options.directory}")
