"""The positions benchmark's own logic, on a tiny model; nothing here is asserted about time."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from foldserve.loadtest.micro.compare import compare
from foldserve.loadtest.micro.positions import Bench
from foldserve.loadtest.micro.shape import Shape
from foldserve.loadtest.micro.withdrawal import TIMED, engine_options, render, table

TINY = Shape(layers=2, hidden=128, image_px=168, text=20, withdraw_layer=1, dtype="float32")


def test_both_kinds_are_timed_in_every_part(tmp_path: Path) -> None:
    bench = Bench(TINY, TINY.write(tmp_path / "model"), **engine_options(dtype=TINY.dtype, pool_mib=16, eager=True))
    rows, clocked = list(bench.pairs(1)), list(bench.clocked(1))
    parts = ["1 at once, whole", "8 at once, whole", "8 at once, decode step"]
    assert [(row.variant, row.part) for row in rows] == [(v, part) for v in ("keep", "control") for part in parts]
    assert {row.goal for row in rows if row.variant == "control"} == {None}
    assert [row.cpu.pairs for row in rows] == [1, 1, 32] * 2
    assert all(row.base_cpu_ms > 0 for row in rows)
    assert [row.part for row in clocked] == ["1 at once, clocked", "8 at once, clocked"]
    assert all(row.cpu.value > 1 and row.wall.value > 1 for row in clocked)  # something was clocked
    assert all(render(row).count("|") == table(TIMED).splitlines()[0].count("|") for row in rows)
    report = json.loads(json.dumps({"ratios": [asdict(row) for row in rows]}))
    assert len(compare(report, report)) >= 2 * 3 * 3  # CPU and wall ratios and the base's milliseconds, each told apart
