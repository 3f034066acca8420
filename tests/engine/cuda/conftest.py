"""The reference of the folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.withdrawal.test_positions import KeepingExpected


@pytest.fixture(scope="session")
def expected(eight_layers: Path) -> KeepingExpected:
    """Answers of plain PyTorch, kept positions included."""
    return KeepingExpected(eight_layers)
