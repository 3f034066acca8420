"""Every golden vector of this folder, one test a case, and the runner itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.golden import CHECKS, FRONTIER, HERE, TABLES, Case, Unsupported, load_cases, load_tables, run_case, run_table
from tests.golden.__main__ import main

NOT_OURS = {"pixel_6x7_D12_mae_t0.03", "pixel_6x7_D12_rmse_t0.04"}
"""Of an option of the authors' that `pixelprune` does not have: other measures than the largest difference."""

Run = Callable[[Path], tuple[int, list[str]]]


@pytest.mark.parametrize("case", load_cases(HERE), ids=lambda case: case.name)
def test_case(case: Case) -> None:
    run_case(case)


@pytest.mark.parametrize("name", load_tables(HERE))
def test_table(name: str) -> None:
    run_table(name, load_tables(HERE)[name])


@pytest.mark.parametrize(
    "case", [case for case in load_cases(FRONTIER) if case.method in CHECKS], ids=lambda case: case.name
)
def test_frontier_case(case: Case) -> None:
    if case.name not in NOT_OURS:
        run_case(case)
        return
    with pytest.raises(Unsupported):
        run_case(case)


@pytest.mark.parametrize("name", [name for name in load_tables(FRONTIER) if name in TABLES])
def test_frontier_table(name: str) -> None:
    run_table(name, load_tables(FRONTIER)[name])


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Exit status and lines of the runner."""

    def runner(folder: Path) -> tuple[int, list[str]]:
        return main([str(folder)]), capsys.readouterr().out.splitlines()

    return runner


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with two cases and one table that may be spoiled."""
    manifest = json.loads((HERE / "manifest.json").read_text())
    manifest["cases"] = [c for c in manifest["cases"] if c["case"] in ("folder_n7_b3_d16_r4", "folder_n7_b3_d16_r5")]
    manifest["integer_tables"] = {"ratio_to_r_int": manifest["integer_tables"]["ratio_to_r_int"]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    shutil.copy(HERE / "folder.safetensors", tmp_path)
    return tmp_path


def test_runner_passes_sound_vectors(copy: Path, run: Run) -> None:
    assert run(copy) == (0, ["integer tables: 1 passed, 0 failed, 0 unsupported", "2 passed, 0 failed, 0 unsupported"])


def test_runner_reports_a_wrong_value_and_a_missing_tensor(copy: Path, run: Run) -> None:
    tensors = load_file(copy / "folder.safetensors")
    tensors["folder_n7_b3_d16_r4.out.features"][0, 0, 0] += 1e-3
    del tensors["folder_n7_b3_d16_r5.in.x"]
    save_file(tensors, copy / "folder.safetensors")
    status, lines = run(copy)
    assert status == 1
    assert lines[1] == "FAILED folder_n7_b3_d16_r4: features: off by 1.00e-03, more than 2e-05"
    assert lines[2].startswith("FAILED folder_n7_b3_d16_r5: ")
    assert lines[-1] == "0 passed, 2 failed, 0 unsupported"


def test_runner_reports_a_wrong_table_row(copy: Path, run: Run) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["integer_tables"]["ratio_to_r_int"][0]["kept"] += 1
    (copy / "manifest.json").write_text(json.dumps(manifest))
    status, lines = run(copy)
    assert status == 1
    assert lines[0].startswith("FAILED ratio_to_r_int: ")


def test_runner_tells_what_it_cannot_compare(copy: Path, run: Run) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["cases"][0]["method"] = "seance"
    manifest["cases"][1]["params"]["order"] = "random"
    manifest["integer_tables"]["other"] = []
    (copy / "manifest.json").write_text(json.dumps(manifest))
    status, lines = run(copy)
    assert status == 0
    assert lines == [
        "unsupported other: no check for this table",
        "integer tables: 1 passed, 0 failed, 1 unsupported",
        "unsupported folder_n7_b3_d16_r4: no check for method 'seance'",
        "unsupported folder_n7_b3_d16_r5: order = 'random', not 'position'",
        "0 passed, 0 failed, 2 unsupported",
    ]
