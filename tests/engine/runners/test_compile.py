"""vLLM's own compile mode, which a CPU does not take by itself: `compile_mode.py`, from an empty cache and again."""

from __future__ import annotations

from pathlib import Path

from tests.engine.cuda.processes import run

FILE = Path(__file__).parent / "compile_mode.py"
QWEN = Path(__file__).parent / "compile_mode_qwen.py"


def test_compile_mode_cold_and_warm(tmp_path: Path) -> None:
    env = {"VLLM_CACHE_ROOT": str(tmp_path / "cache"), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    run(FILE, **env)
    run(FILE, **env)


def test_qwen3_vl_in_compile_mode(tmp_path: Path) -> None:
    run(QWEN, VLLM_CACHE_ROOT=str(tmp_path / "cache"), TORCHINDUCTOR_COMPILE_THREADS="1")
