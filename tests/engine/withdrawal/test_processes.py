"""Model runner V2, as far as a machine without a GPU can run it, and tensor parallelism."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run(name: str, path: Path, **environment: str) -> None:
    command = [sys.executable, "-m", "tests.engine.withdrawal.processes", name, str(path)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    assert "equal to the reference" in done.stdout


def test_model_runner_v2_with_interpreted_kernels(eight_layers: Path) -> None:
    run("runner_v2", eight_layers, TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1")


def test_two_ranks(eight_layers: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    run("two_ranks", eight_layers, VLLM_CPU_OMP_THREADS_BIND=f"{cores[0]}|{cores[-1]}")
