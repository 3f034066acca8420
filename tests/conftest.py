"""Shared by several test folders: a small checkpoint, its plain reference, and settings of the test process.

vLLM runs inside the test process here (no child for the engine), with one thread: starts in seconds instead of half a
minute, and generates much faster than with OpenMP threads that wait for each other.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import pytest
from xdist.scheduler import LoadFileScheduling

_ON_ONE_SERVER = (
    "bad_inputs",
    "batch",
    "chat",
    "dialects",
    "front",
    "playground",
    "positions",
    "reduction_map",
    "schema_fuzz",
)
ON_ONE_SERVER = tuple(f"tests/api/test_{name}.py::" for name in _ON_ONE_SERVER)
"""Files that use the fixture `server_url`, which lives as long as its worker."""


class Scheduling(LoadFileScheduling):
    """`--dist loadfile`, but the files on one server go to one worker."""

    def _split_scope(self, nodeid: str) -> str:
        return ON_ONE_SERVER[0] if nodeid.startswith(ON_ONE_SERVER) else super()._split_scope(nodeid)


def pytest_configure() -> None:
    gc.disable()  # until all is collected: importing vLLM leaves no garbage, and looking for it takes a fifth


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "server_url" in getattr(item, "fixturenames", ()) and not item.nodeid.startswith(ON_ONE_SERVER):
            raise pytest.UsageError(f"{item.nodeid} would start a second server: name its file in {__file__}")


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else C++ libraries list as leaked what was imported


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    return Scheduling(config, log) if config.getoption("dist") == "loadfile" else None


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
