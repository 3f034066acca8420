"""Model runner V2, as far as a machine without a GPU can run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_model_runner_v2_with_interpreted_kernels(eight_layers: Path) -> None:
    command = [sys.executable, "-m", "tests.engine.withdrawal.v2_process", str(eight_layers)]
    env = os.environ | {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    assert "equal to the reference" in done.stdout
