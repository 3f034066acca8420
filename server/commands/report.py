"""`foldserve report`."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from foldserve.server.commands.parser import declare
from foldserve.server.options import option, positional

_DESCRIPTION = """\
Makes the page of a finished `foldserve loadtest`, `evaluate` or `gpu-check` again from the results in its folder, with
the charts of this version. With two folders of the same command, compares them: the same charts with both, and a table
of differences with intervals. Nothing is measured.
"""


_LONGEST_NAME = 20  # letters of a folder's name in the titles of panels


@dataclass(frozen=True, slots=True)
class ReportOptions:
    """Raises ValueError for more than two folders."""

    folders: tuple[Path, ...] = positional("DIR", "a folder that a command wrote; two are compared", nargs="+")
    output: Path | None = option(None, "DIR", "(default: that of the results, or report-comparison)")

    def __post_init__(self) -> None:
        if len(self.folders) > 2:
            raise ValueError(f"one folder is drawn again, or two are compared, not {len(self.folders)}")


class _Kind(NamedTuple):
    """Results that a command leaves in its folder; `read` raises ValueError."""

    command: str
    file: str
    read: Callable[[Path], Any]
    write: Callable[[Any, Path], None]
    compare: Callable[[Mapping[str, Any], Path], None]


def add(parser: ArgumentParser) -> None:
    declare(parser, ReportOptions, _run, _DESCRIPTION)


def _run(options: ReportOptions, rest: list[str]) -> None:
    kinds = [_kind(folder) for folder in options.folders]
    if len({kind.command for kind in kinds}) > 1:
        raise ValueError(f"only results of one command can be compared, not {' and '.join(k.command for k in kinds)}")
    kind = kinds[0]
    found = [kind.read(folder) for folder in options.folders]
    if len(found) == 1:
        output = options.output or options.folders[0]
        output.mkdir(parents=True, exist_ok=True)
        kind.write(found[0], output)
    else:
        output = options.output or Path("report-comparison")
        output.mkdir(parents=True, exist_ok=True)
        kind.compare(dict(zip(_names(*options.folders), found, strict=True)), output)
    print(f"Written to {output}: index.html and pictures.")


def _kind(folder: Path) -> _Kind:
    kinds = _kinds()
    for kind in kinds:
        if (folder / kind.file).is_file():
            return kind
    expected = ", ".join(f"{kind.file} of `foldserve {kind.command}`" for kind in kinds)
    raise ValueError(f"{folder} holds no results: none of {expected}")


def _kinds() -> list[_Kind]:
    from foldserve.loadtest import side_by_side as loads
    from foldserve.loadtest import throughput
    from foldserve.server.quality.evaluation import side_by_side as cards
    from foldserve.server.quality.evaluation.card import CARD_FILE, Card
    from foldserve.server.quality.evaluation.tables import write_page as write_card
    from foldserve.server.quality.gpu_check import side_by_side as checks
    from foldserve.server.quality.gpu_check.page import write_page as write_check
    from foldserve.server.quality.gpu_check.result import RESULTS_FILE, CheckResults

    return [
        _Kind("loadtest", throughput.REPORT_FILE, throughput.read, throughput.write, loads.write),
        _Kind("gpu-check", RESULTS_FILE, lambda f: CheckResults.read(f / RESULTS_FILE), write_check, checks.write),
        _Kind("evaluate", CARD_FILE, lambda f: Card.read(f / CARD_FILE), write_card, cards.write),
    ]


def _names(first: Path, second: Path) -> tuple[str, str]:
    """Names of the folders on the page: the last parts of their paths that differ."""
    parts = first.resolve().parts, second.resolve().parts
    for count in range(1, min(map(len, parts)) + 1):
        one, other = ("/".join(each[-count:])[-_LONGEST_NAME:] for each in parts)
        if one != other:
            return one, other
    raise ValueError(f"{first} and {second} are the same folder")
