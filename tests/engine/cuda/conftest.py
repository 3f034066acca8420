"""The checkpoint of the folder, and its reference."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.withdrawal.conftest import LAYERS
from tests.engine.withdrawal.test_positions import KeepingExpected


@pytest.fixture(scope="session")
def eight_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA-1.5 checkpoint in fp32 with eight decoder layers and 144 vision tokens per image."""
    from foldserve.server.quality.demo_model import create

    return create(tmp_path_factory.mktemp("checkpoints") / "eight-layers", image_size=168, num_layers=LAYERS)


@pytest.fixture(scope="session")
def expected(eight_layers: Path) -> KeepingExpected:
    """Answers of plain PyTorch, kept positions included."""
    return KeepingExpected(eight_layers)
