"""The arrows of the house: who may import whom. Read from the source, so that no import has to happen."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "foldserve"

# Where a module lives -> what of ours it may import; the longest matching prefix counts.
OURS = {
    "reducers": ["reducers"],
    "kernels": ["kernels", "reducers"],
    "server": [],
    "server/access": ["server/options"],
    "server/folders": [],
    "server/guardian": ["server/output"],
    "server/limits": ["server/options"],
    "server/options": [],
    "server/output": [],
    "server/settings": ["server/access", "server/limits", "server/options", "reducers"],
    "server/engine": ["server/engine", "server/guardian", "server/settings", "kernels", "reducers"],
    "server/api": [
        "server/access",
        "server/api",
        "server/engine",
        "server/guardian",
        "server/limits",
        "server/output",
        "server/settings",
        "kernels",
        "reducers",
    ],
    "server/quality": [
        "server/quality",
        "server/engine",
        "server/folders",
        "server/options",
        "server/settings",
        "loadtest/report",
        "kernels",
        "reducers",
    ],
    "server/convert": ["server/convert", "server/folders", "reducers"],
    "server/cli": ["server/commands", "server/guardian", "server/output"],
    "server/commands": [
        "server/commands",
        "server/access",
        "server/limits",
        "server/options",
        "server/settings",
        "server/api",
        "server/convert",
        "server/quality",
        "loadtest",
    ],
    "loadtest": ["loadtest", "server/options"],
    "loadtest/report": ["loadtest/report"],
    "loadtest/micro": ["loadtest", "server/engine", "server/quality", "kernels", "reducers"],
    "loadtest/micro/http_protocol": ["loadtest", "server/api"],
    "deploy": [],
}
PURE_TORCH = {"reducers": {"torch"}, "kernels": {"torch", "triton"}}
MAY_IMPORT_VLLM = ("server/engine", "server/api", "server/quality/engine", "loadtest/micro")

SOURCES = sorted(
    path.relative_to(ROOT)
    for folder in ("server", "reducers", "kernels", "loadtest", "deploy")
    for path in (ROOT / folder).rglob("*.py")
)


def imported(source: str, module: str) -> Iterator[str]:
    """Dotted names that `source`, the text of `module` (dotted), imports, at any depth and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)


def within(place: str, folder: str) -> bool:
    return place == folder or place.startswith(f"{folder}/")


def broken_arrows(file: Path, source: str) -> list[str]:
    """The imports of `source` that `file` (relative to the root) may not have."""
    place = file.with_suffix("").as_posix().removesuffix("/__init__")
    layer = max((folder for folder in OURS if within(place, folder)), key=len)
    package = file.parts[0]
    broken = []
    for name in imported(source, f"{PACKAGE}.{'.'.join(file.with_suffix('').parts)}"):
        top = name.split(".")[0]
        if top == PACKAGE:
            target = "/".join(name.split(".")[1:])
            allowed = any(within(target, folder) for folder in OURS[layer])
        elif top == "vllm":
            allowed = any(within(place, folder) for folder in MAY_IMPORT_VLLM)
        else:
            allowed = package not in PURE_TORCH or top in PURE_TORCH[package] or top in sys.stdlib_module_names
        if not allowed:
            broken.append(name)
    return broken


@pytest.mark.parametrize("file", SOURCES, ids=str)
def test_imports_follow_the_arrows(file: Path) -> None:
    assert broken_arrows(file, (ROOT / file).read_text()) == []


@pytest.mark.parametrize(
    ("file", "source", "broken"),
    [
        ("reducers/plan.py", "import vllm.config", ["vllm.config"]),
        ("reducers/plan.py", "import numpy", ["numpy"]),
        ("reducers/plan.py", "import torch, math", []),
        ("reducers/plan.py", "from foldserve.kernels import ops", ["foldserve.kernels.ops"]),
        ("kernels/ops.py", "from foldserve.reducers.folder import folder", []),
        (
            "server/engine/llava.py",
            "def f():\n    from foldserve.server.api import schema",
            ["foldserve.server.api.schema"],
        ),
        ("server/engine/llava.py", "from ..api import schema", ["foldserve.server.api.schema"]),
        ("server/api/schema.py", "from foldserve.server.engine.vision import f\nimport vllm", []),
        ("server/api/schema.py", "from foldserve.server.quality import x", ["foldserve.server.quality.x"]),
        ("server/quality/demo_model.py", "import vllm", ["vllm"]),
        ("server/quality/demo_model.py", "from foldserve.server import api", ["foldserve.server.api"]),
        ("server/quality/evaluation/card.py", "from foldserve.loadtest.report import page", []),
        ("server/quality/evaluation/card.py", "from foldserve.loadtest import run", ["foldserve.loadtest.run"]),
        ("server/cli.py", "from vllm import LLM", ["vllm.LLM"]),
        ("loadtest/run.py", "import foldserve.reducers", ["foldserve.reducers"]),
        ("loadtest/report/page.py", "from foldserve.loadtest import grid", ["foldserve.loadtest.grid"]),
        ("loadtest/micro/fold.py", "import foldserve.reducers.folder", []),
        ("deploy/check.py", "import foldserve", ["foldserve"]),
    ],
)
def test_the_check_itself(file: str, source: str, broken: list[str]) -> None:
    assert broken_arrows(Path(file), source) == broken


def test_kernels_is_no_regular_package() -> None:
    # With an __init__.py, `import kernels` works from the root of the repository, and transformers probes that name.
    assert not (ROOT / "kernels" / "__init__.py").exists()
