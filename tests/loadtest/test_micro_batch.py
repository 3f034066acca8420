"""What `foldserve batch` is compared with HTTP by; the engines are tested elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from foldserve.loadtest.micro.batch import lines, rate, table, watch


def test_the_rate_leaves_out_the_warm_up() -> None:
    slow_start = [100.0, 110.0, 120.0, 120.5, 121.0, 121.5, 122.0]
    assert rate(slow_start[::-1], warm_up=3) == pytest.approx(2.0)
    assert rate(slow_start, warm_up=1) == pytest.approx(6 / 22)


def test_lines_are_a_batch_file() -> None:
    found = [json.loads(line) for line in lines([[{"role": "user"}], []], {"temperature": 0}).splitlines()]
    assert [line.pop("custom_id") for line in found] == ["0", "1"]
    envelope = {"method": "POST", "url": "/v1/chat/completions"}
    assert found[0] == envelope | {"body": {"messages": [{"role": "user"}], "temperature": 0}}


def test_every_line_of_a_run_is_seen_once_in_its_time(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.touch()
    program = "import time\nfor i in range(3): print(i, flush=True); time.sleep(0.3)\nprint(3)"
    with output.open("w") as out:
        done = watch(subprocess.Popen([sys.executable, "-c", program], stdout=out), output)
    assert len(done) == 4
    assert all(after - before > 0.1 for before, after in pairwise(done))


def test_the_table_has_medians_and_ratios_within_rounds() -> None:
    rounds = [({0.0: 10.0, 0.5: 30.0}, {0.0: 20.0, 0.5: 30.0}), ({0.0: 1.0, 0.5: 33.0}, {0.0: 2.0, 0.5: 30.0})]
    first, second = table(rounds).splitlines()[2:]
    assert first.startswith("| 0 | 5.5 | 11.0 | 0.5")
    assert second.startswith("| 0.5 | 31.5 | 30.0 | 1.05")
