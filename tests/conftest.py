"""What several test folders share: one small checkpoint, its plain reference, and settings of the test process.

vLLM runs inside the test process here (no child for the engine), with one thread: starts in seconds instead of half a
minute, and generates much faster than with OpenMP threads that wait for each other.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import pytest


def pytest_runtest_setup() -> None:
    """Lets several engines live in this process.

    An engine that ends, or is collected as garbage, takes down the process groups that all of them share. One that ends
    in the very test that imports vLLM is the only one.
    """
    if core := sys.modules.get("vllm.v1.engine.core"):
        vars(core)["cleanup_dist_env_and_memory"] = lambda: None


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA-1.5 checkpoint in fp32 with 144 vision tokens per image and random weights."""
    from foldserve.server.quality.demo_model import create

    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-llava"
    return create(folder, image_size=168, num_layers=4)
