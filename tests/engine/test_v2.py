"""Model runner V2, which a GPU takes, as far as a machine without one can run it.

Which runner an engine has is read from the environment once per process, so this is a pytest of its own. Interpreted
kernels are slow: `make test-runners` runs more.
"""

from __future__ import annotations

from tests.engine.cuda.processes import V2, run

TESTS = (
    "withdrawal/on_v2.py",
    "test_positions_engine.py::test_one_batch_of_all_kinds",
    "test_positions_engine.py::test_positions_are_those_of_the_reference",
)


def test_withdrawal_and_positions() -> None:
    run(*(f"tests/engine/{name}" for name in TESTS), **V2)
