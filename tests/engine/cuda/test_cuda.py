"""What only a server with CUDA runs, as far as a machine without it can run it.

What changes vLLM's platform or `torch.cuda` does so for a whole process, so it is a pytest of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def run(*files: str, **env: str) -> None:
    """Runs the tests of these files, of which all have to pass, with a changed environment."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider"]
    command += [str(FOLDER / name) for name in files]
    done = subprocess.run(
        command, env=os.environ | env, capture_output=True, text=True, cwd=FOLDER.parents[2], check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"^\d+ passed", done.stdout.splitlines()[-1])


def test_asynchronous_loop_and_metadata_builders() -> None:
    """In this order: the builders take the process for one with CUDA."""
    run("async_loop.py", "builders.py", VLLM_USE_V2_MODEL_RUNNER="0")


def test_asynchronous_loop_with_model_runner_v2() -> None:
    run("async_loop.py", VLLM_USE_V2_MODEL_RUNNER="1", TRITON_INTERPRET="1")


def test_compile_mode_cold_and_warm(tmp_path: Path) -> None:
    env = {"VLLM_CACHE_ROOT": str(tmp_path / "cache"), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    run("compile_mode.py", **env)
    run("compile_mode.py", **env)
