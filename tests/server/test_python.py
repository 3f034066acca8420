"""`foldserve.reduction`, which makes reductions for offline use."""

from __future__ import annotations

import subprocess
import sys

import pytest

import foldserve
from foldserve.reducers.reduction import InvalidReduction
from foldserve.server.engine.processor import KWARG


def test_it_makes_what_the_processor_takes() -> None:
    assert foldserve.reduction() == {KWARG: {}}
    assert foldserve.reduction(ratio=0.5) == {KWARG: {"ratio": 0.5}}
    asked = foldserve.reduction(method="tome", keep_tokens=20, positions="keep", withdraw=True)
    assert asked == {KWARG: {"method": "tome", "keep_tokens": 20, "positions": "keep", "withdraw": True}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"ratio": 1.5}, "ratio"),
        ({"ratio": "0.5"}, "ratio"),
        ({"keep_tokens": 1}, "keep_tokens"),
        ({"ratio": 0.5, "keep_tokens": 20}, "ratio"),
        ({"method": "magic"}, "method"),
        ({"rato": 0.5}, "rato"),
        ({"scale": "none", "method": "pool"}, "scale"),
    ],
)
def test_it_refuses_what_a_server_refuses(fields: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidReduction) as caught:
        foldserve.reduction(**fields)  # type: ignore[arg-type]
    assert caught.value.param == param


def test_importing_it_loads_nothing_else() -> None:
    code = "import sys, foldserve; sys.exit(bool({'torch', 'vllm', 'numpy', 'foldserve.reducers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
