"""Code that runs with CUDA only, as far as a machine without CUDA can run it.

What changes vLLM's platform or `torch.cuda` does so for a whole process, so it is a pytest of its own.
"""

from __future__ import annotations

from pathlib import Path

from tests.engine.cuda.processes import run

FOLDER = Path(__file__).parent


def test_host_copies_asynchronous_loop_and_metadata_builders() -> None:
    """In this order: an engine on a CPU takes away how vLLM pins memory, and the builders take the process for one with
    CUDA. With model runner V2: `make test-runners`."""
    files = ("host_copies.py", "async_loop.py", "builders.py")
    run(*(FOLDER / name for name in files), VLLM_USE_V2_MODEL_RUNNER="0")
