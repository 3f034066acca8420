"""`foldserve report`: pages from saved results, and two results side by side."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from foldserve.loadtest import throughput
from foldserve.server import cli
from foldserve.server.quality.evaluation.card import CARD_FILE
from foldserve.server.quality.gpu_check.result import RESULTS_FILE, CheckResults, StageResult
from tests.loadtest.made_up import rows
from tests.quality.test_card_charts import card


def load_test(folder: Path) -> None:
    settings = {"machine": "2 CPUs", "date": "2026-11-30"}
    throughput.write(throughput.LoadTestReport(folder.name, settings, rows(("folder",), (1,), (0.5,)), []), folder)


def evaluation(folder: Path) -> None:
    card(0.03, "folder").write(folder / CARD_FILE)


def gpu_check(folder: Path) -> None:
    row = {
        "engine": "plain vLLM",
        "runner": "v1",
        "ratio": 0,
        "prompt_tokens": 9,
        "requests_per_s": 2.0,
        "ttft_ms": 3.0,
    }
    row |= {"itl_ms": 1.0, "sequences": 5, "peak_bytes": None}
    found = {"requests": 4, "tokens": 4, "rows": [row, row | {"engine": "foldserve"}]}
    stage = StageResult(stage="load", status="PASS", seconds=1, shows="speed", line="fast", details=found)
    folder.mkdir()
    results = CheckResults(device="cuda", facts={"GPU 0": folder.name}, stages=(stage,))
    (folder / RESULTS_FILE).write_text(results.model_dump_json())


MAKERS = pytest.mark.parametrize("make", [load_test, evaluation, gpu_check], ids=lambda make: make.__name__)


@MAKERS
def test_a_page_is_made_again(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "one")
    saved = next((tmp_path / "one").glob("*.json")).read_bytes()
    cli.main(["report", str(tmp_path / "one")])
    assert "<svg" in (tmp_path / "one" / "index.html").read_text()
    assert next((tmp_path / "one").glob("*.json")).read_bytes() == saved


@MAKERS
def test_two_are_compared(make: Callable[[Path], None], tmp_path: Path) -> None:
    for name in ("one", "other"):
        make(tmp_path / name)
    cli.main(["report", str(tmp_path / "one"), str(tmp_path / "other"), "--output", str(tmp_path / "both")])
    page = (tmp_path / "both" / "index.html").read_text()
    assert "one beside other" in page and "<h2>Differences</h2>" in page and "<svg" in page


def test_what_can_not_be_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_test(tmp_path / "load")
    gpu_check(tmp_path / "gpu")
    shutil.copytree(tmp_path / "load", tmp_path / "broken")
    (tmp_path / "broken" / "report.json").write_text(json.dumps({"title": "x"}))
    for folders, message in (
        (["load", "gpu"], "only results of one command can be compared, not loadtest and gpu-check"),
        (["load", "load"], "are the same folder"),
        (["load", "load", "load"], "not 3"),
        (["."], "holds no results: none of report.json of `foldserve loadtest`"),
        (["broken"], "is no report of `foldserve loadtest`"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["report", *(str(tmp_path / folder) for folder in folders)])
        assert message in capsys.readouterr().err
