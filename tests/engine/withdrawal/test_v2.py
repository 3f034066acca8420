"""Model runner V2, as far as a machine without a GPU can run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_model_runner_v2_with_interpreted_kernels(eight_layers: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    command = [sys.executable, "-m", "tests.engine.withdrawal.v2_process", str(eight_layers)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    assert "11 cases twice, equal to the reference" in done.stdout
