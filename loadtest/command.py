"""`foldserve loadtest` from its options to the files it writes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from foldserve.loadtest.grid import Block, GridPoint, schedule
from foldserve.loadtest.options import LoadTestOptions
from foldserve.loadtest.prediction import read_shape
from foldserve.loadtest.quality import read_accuracy
from foldserve.loadtest.record import BlockJournal, Record, joined
from foldserve.loadtest.report.journal import run_identity
from foldserve.loadtest.report.machine import machine, measured_on
from foldserve.loadtest.run import BlockRunner
from foldserve.loadtest.servers import Fleet
from foldserve.loadtest.summary import summarise
from foldserve.loadtest.throughput import LoadTestReport, write
from foldserve.loadtest.workloads import WORKLOADS

_NOT_THE_SAME = (
    "output", "quality", "shape_from", "methods", "ratios", "withdraw", "concurrency", "rate", "speed", "requests",
    "blocks", "rounds",
)  # fmt: skip
"""Options that may change without making earlier results invalid: they choose blocks, or shape the report."""


def run(
    options: LoadTestOptions, engine_options: Sequence[str], variables: Mapping[str, str] = MappingProxyType({})
) -> LoadTestReport:
    """Measures the blocks that the journal lacks and writes the report.

    Args:
        variables: environment variables of the servers that are started here, beside those of this process.

    Raises:
        ValueError: what is asked cannot be done.
        RuntimeError: a server did not start or did not answer.
    """
    variants, loads = options.grid()
    blocks = schedule(variants, loads, options.rounds, beside=options.beside)
    journal = BlockJournal(options.output, _identity(options, engine_options))
    fleet = Fleet(
        options.urls(),
        options.server_options(engine_options),
        options.output / "logs",
        beside=options.beside,
        variables=variables,
    )
    load = [os.getloadavg()[0]]
    try:
        BlockRunner(options, fleet).measure(blocks, variants, journal)
    finally:
        fleet.stop()
    load.append(os.getloadavg()[0])
    report = _report(options, engine_options, blocks, journal, load)
    write(report, options.output)
    return report


def _report(
    options: LoadTestOptions,
    engine_options: Sequence[str],
    blocks: Sequence[Block],
    journal: BlockJournal,
    load: Sequence[float],
) -> LoadTestReport:
    rounds: dict[tuple[GridPoint, int], list[Record]] = {}
    for block in blocks:
        rounds.setdefault((block.point, block.round), []).append(journal[block.key])
    records: dict[GridPoint, list[Record]] = {}
    for (point, _), of_round in rounds.items():
        records.setdefault(point, []).append(joined(of_round))
    checkpoint = options.shape_from or options.model
    # the formulas hold for images only: a tower encodes the frames of a video one by one
    shape = read_shape(checkpoint, options.withdraw_layer) if checkpoint and options.workload != "video" else None
    return LoadTestReport(
        title=Path(options.model).name if options.model else f"the server at {options.url}",
        settings=_settings(options, engine_options, load),
        rows=summarise(records, shape),
        accuracy=read_accuracy(options.quality) if options.quality else [],
    )


def _settings(options: LoadTestOptions, engine_options: Sequence[str], load: Sequence[float]) -> dict[str, str]:
    workload = f"trace {options.trace.name}" if options.trace else WORKLOADS[options.workload].describe
    images = f"{options.repeat_images} different ones" if options.repeat_images else "each a new one"
    return {
        "workload": f"{workload}; {options.words} words a question, {options.answer_tokens} output tokens",
        "images": f"{options.images.name if options.images else f'{options.image_size} px, generated'}, {images}",
        "blocks": f"{', '.join(map(str, options.requests))} requests, {', '.join(map(str, options.blocks))} in each of "
        f"{options.rounds} rounds (ABBA), "
        f"{'servers side by side' if options.beside else 'one server at a time'}"
        f"{', started anew for every round' if options.restart and not options.url else ''}",
        "server options": " ".join(engine_options) or "none",
        "date": measured_on(options.output),
        "machine": f"{machine()}, load average {load[0]:.1f} before and {load[-1]:.1f} after",
        "versions": _versions(),
    }


def _versions() -> str:
    found = []
    for name in ("foldserve", "vllm", "torch"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed here")
    return ", ".join(found)


def _identity(options: LoadTestOptions, engine_options: Sequence[str]) -> str:
    """Hash of everything that a block's result depends on, except its key."""
    fields: dict[str, Any] = {k: v for k, v in asdict(options).items() if k not in _NOT_THE_SAME}
    return run_identity(options={k: str(v) for k, v in fields.items()}, engine=list(engine_options), of=_versions())
