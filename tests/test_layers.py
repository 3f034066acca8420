"""Which package may import which, read from the source without importing anything."""

from __future__ import annotations

import sys
from graphlib import CycleError
from pathlib import Path

import pytest

from tools.arrows import PACKAGE, PAGE, ROOT, SOURCES, arrows, imports_of, picture, place_of, redrawn, within

# Where a module lives -> what of ours it may import; the longest matching prefix counts.
OURS = {
    "reducers": ["reducers"],
    "kernels": ["kernels", "reducers"],
    "server": [],
    "server/access": ["server/options"],
    "server/auto": ["reducers"],
    "server/folders": [],
    "server/guardian": ["server/output"],
    "server/limits": ["server/options", "server/video"],
    "server/options": [],
    "server/output": [],
    "server/pressure": [],
    "server/video": ["server/video"],
    "server/settings": ["server/access", "server/auto", "server/limits", "server/options", "reducers"],
    "server/engine": ["server/engine", "server/guardian", "server/pressure", "server/settings", "kernels", "reducers"],
    "server/api": [
        "server/access",
        "server/auto",
        "server/api",
        "server/engine",
        "server/guardian",
        "server/limits",
        "server/output",
        "server/pressure",
        "server/settings",
        "server/video",
        "kernels",
        "reducers",
    ],
    "server/quality": [
        "server/quality",
        "server/auto",
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
        "server/auto",
        "server/limits",
        "server/options",
        "server/settings",
        "server/api",
        "server/convert",
        "server/quality",
        "loadtest",
        "reducers",
    ],
    "loadtest": ["loadtest", "server/options"],
    "loadtest/report": ["loadtest/report"],
    "loadtest/micro": ["loadtest", "server/engine", "server/quality", "kernels", "reducers"],
    "loadtest/micro/http_protocol": ["loadtest", "server/api"],
    "loadtest/micro/video": ["loadtest", "server/limits", "server/video"],
    "deploy": [],
}
PURE_TORCH = {"reducers": {"torch"}, "kernels": {"torch", "triton"}}
MAY_IMPORT_VLLM = ("server/engine", "server/api", "server/quality/engine", "loadtest/micro")


def broken_arrows(file: Path, source: str) -> list[str]:
    """The imports of `source` that `file` (relative to the root) may not have."""
    place = place_of(file)
    layer = max((folder for folder in OURS if within(place, folder)), key=len)
    package = file.parts[0]
    broken = []
    for name in imports_of(file, source):
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
    broken = broken_arrows(file, (ROOT / file).read_text())
    assert broken == [], f"{file} may not import these: see OURS, PURE_TORCH and MAY_IMPORT_VLLM"


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


def test_only_tests_import_tests() -> None:
    files = [*SOURCES, *(path.relative_to(ROOT) for path in (ROOT / "tools").rglob("*.py"))]
    found = [(file, name) for file in files for name in imports_of(file, (ROOT / file).read_text())]
    assert [pair for pair in found if pair[1].split(".")[0] == "tests"] == []


def test_kernels_is_no_regular_package() -> None:
    # With an __init__.py, `import kernels` works from the root of the repository, and transformers probes that name.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_picture_of_the_arrows() -> None:
    page = PAGE.read_text()
    assert page == redrawn(page), f"{PAGE} shows other arrows than the imports: run `python -m tools.arrows`"


@pytest.mark.parametrize(
    ("arrow", "shown"),
    [
        (("deploy", "loadtest"), "deploy --> loadtest"),
        (("loadtest", "vllm"), '["<b>loadtest</b><br>throughput, soak"]:::vllm'),
        (("server/cli", "reducers"), None),  # follows from others
    ],
    ids=["new", "vllm", "implied"],
)
def test_what_the_picture_shows(arrow: tuple[str, str], shown: str | None) -> None:
    before, after = picture(arrows()), picture(arrows() | {arrow})
    assert after == before if shown is None else shown in after and shown not in before


@pytest.mark.parametrize("arrow", [("reducers", "kernels"), ("server", "server/commands")], ids=" -> ".join)
def test_folders_import_each_other_in_no_circle(arrow: tuple[str, str]) -> None:
    picture(arrows())
    with pytest.raises(CycleError):
        picture(arrows() | {arrow})
