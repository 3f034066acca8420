"""`foldserve gpu-check --device cpu`: every stage that a CPU can run, in processes, against vLLM's own classes too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.engine.cuda.processes import V2, run


def test_all_that_a_cpu_can_run(tiny_llava: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "foldserve.server.cli", "gpu-check", "--device", "cpu", "--output", str(tmp_path)]
    done = subprocess.run([*command, "--model", str(tiny_llava)], capture_output=True, text=True, check=False)
    stages = json.loads((tmp_path / "gpu-check.json").read_text())["stages"]
    passed = {stage["stage"] for stage in stages if stage["status"] == "PASS"}
    # Speed is not asserted in this house: `load` fails where the machine is busy, but it measures.
    assert passed | {"load"} == {"smoke", "ratio-0", "reference", "burst", "load"}, done.stdout
    assert done.returncode == ("load" not in passed)
    (load,) = (stage for stage in stages if stage["stage"] == "load")
    assert load["status"] == "PASS" or "requests/s" in load["line"], done.stdout
    assert "GPU check:" in (tmp_path / "gpu-check.md").read_text()


def test_jobs_on_model_runner_v2() -> None:
    run(Path(__file__).parent / "gpu_check_on_v2.py", **V2)
