"""The sizing table: the formula's own numbers, the server's KV cost, and the table in the documentation."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from types import ModuleType

import pytest

from tests.deploy.files import DEPLOY, ROOT


@pytest.fixture(scope="module")
def sizing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sizing", DEPLOY / "sizing.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sizing"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("vision", "layer", "mib"), [(576, None, 320), (192, None, 128), (192, 16, 80)])
def test_kv_of_a_sequence(sizing: ModuleType, vision: int, layer: int | None, mib: int) -> None:
    assert sizing.MODELS[0].sequence_bytes(64, vision, layer) == mib * 2**20


def test_what_is_saved_is_what_the_servers_metric_counts(sizing: ModuleType) -> None:
    from foldserve.server.engine.kv_cost import KvCost

    for model in sizing.MODELS:
        cost = KvCost(4 * model.hidden, model.layers, model.paper_k)
        saved = model.sequence_bytes(64, 576) - model.sequence_bytes(64, 192, model.paper_k)
        assert saved == cost.saved_bytes(removed=576 - 192, withdrawn=192)


def test_whole_blocks_are_counted(sizing: ModuleType) -> None:
    one, sixteen, more = (sizing.MODELS[0].sequence_bytes(text, 0) for text in (1, 16, 17))
    assert one == sixteen and more == 2 * sixteen


def test_the_documentation_has_the_table() -> None:
    printed = subprocess.run([sys.executable, DEPLOY / "sizing.py"], capture_output=True, text=True, check=True).stdout
    assert printed in (ROOT / "docs" / "guides" / "operations.md").read_text()
