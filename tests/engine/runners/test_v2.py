"""Model runner V2, as far as a machine without a GPU can run it: positions, methods and withdrawal once more.

Which runner an engine has is read from the environment once per process, so this is a pytest of its own. Here it runs
some of each, for interpreted kernels are slow; CONTRIBUTING.md has the command for all.
"""

from __future__ import annotations

from tests.engine.cuda.processes import V2, run

TESTS = (
    "test_positions_engine.py",
    "withdrawal/test_positions.py::test_chunks_that_cut_images_and_again_from_the_cache",
    "withdrawal/test_positions.py::test_chosen_tokens",
    "test_methods.py::test_all_in_one_batch_and_again_from_the_cache",
)


def test_model_runner_v2_with_interpreted_kernels() -> None:
    run(*(f"tests/engine/{name}" for name in TESTS), **V2)


def test_asynchronous_loop() -> None:
    run("tests/engine/cuda/async_loop.py", **V2)
