"""Model runner V2, as far as a machine without a GPU can run it: positions, methods and withdrawal once more.

Which runner an engine has is read from the environment once per process, so this is a pytest of its own. Here it runs
some of each, for interpreted kernels are slow; CONTRIBUTING.md has the command for all.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = (
    "test_positions_engine.py",
    "withdrawal/test_positions.py::test_chunks_that_cut_images_and_again_from_the_cache",
    "withdrawal/test_positions.py::test_chosen_tokens",
    "test_methods.py::test_all_in_one_batch_and_again_from_the_cache",
)


def test_model_runner_v2_with_interpreted_kernels() -> None:
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider"]
    command += [f"tests/engine/{name}" for name in TESTS]
    env = os.environ | {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"^\d+ passed", done.stdout.splitlines()[-1])
