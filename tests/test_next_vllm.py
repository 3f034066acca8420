"""The overlay of tools/next_vllm.py, from a made-up wheel and a made-up installation."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution, version
from pathlib import Path

import pytest

from foldserve.server.engine.plugin import ALLOW_VLLM, vllm_version
from tools import next_vllm

METADATA = f"""Metadata-Version: 2.4
Name: vllm
Version: 9.9.0
Requires-Dist: pytest<1
Requires-Dist: packaging>={version("packaging")}
Requires-Dist: only-on-gpus-9000==1
Requires-Dist: numpy<1; extra == "bench"
Requires-Dist: numpy<1; python_version < "3"
"""


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """With Python, data, a compiled library and a compiled program."""
    file = tmp_path / "vllm-9.9.0-cp38-abi3-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("vllm/__init__.py", "from vllm.moved.here import NAME\n")
        archive.writestr("vllm/moved/here.py", "NAME = 'new'\n")
        archive.writestr("vllm/moved/table.json", "{}")
        archive.writestr("vllm/_C.abi3.so", b"\x7fELF new")
        archive.writestr("vllm/program", b"\x7fELF new")
        archive.writestr("vllm-9.9.0.dist-info/METADATA", METADATA)
        archive.writestr("vllm-9.9.0.dist-info/RECORD", "vllm/__init__.py,,\n")
    return file


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    package = tmp_path / "site-packages" / "vllm"
    (package / "deep").mkdir(parents=True)
    (package / "__init__.py").write_text("NAME = 'old'\n")
    (package / "gone.py").touch()
    (package / "_C.abi3.so").write_bytes(b"\x7fELF old")
    (package / "deep" / "_D.so").write_bytes(b"\x7fELF old")
    return package


def build(wheel: Path, installed: Path, overlay: Path) -> Distribution:
    return next_vllm.build(wheel, installed, overlay, "cpu")


def test_new_python_with_old_libraries(wheel: Path, installed: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay"
    build(wheel, installed, overlay)
    files = {str(file.relative_to(overlay)) for file in overlay.rglob("*") if not file.is_dir()}
    python = {"vllm/__init__.py", "vllm/moved/here.py", "vllm/moved/table.json"}
    assert files == python | {"vllm/_C.abi3.so", "vllm/deep/_D.so", "vllm-9.9.0+cpu.dist-info/METADATA"}
    for library in ("_C.abi3.so", "deep/_D.so"):
        assert (overlay / "vllm" / library).samefile(installed / library)


def test_a_command_sees_the_overlay_first(
    wheel: Path, installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlay = tmp_path / "overlay"
    build(wheel, installed, overlay)
    monkeypatch.setenv("PYTHONPATH", str(installed.parent))
    code = f"""
import os, vllm
from importlib.metadata import version
print(vllm.NAME, version("vllm"), os.environ["{ALLOW_VLLM}"])
"""
    env = os.environ | next_vllm.environment(overlay)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["new", "9.9.0+cpu", next_vllm.NEXT]


def test_what_the_environment_has_in_another_version(wheel: Path, installed: Path, tmp_path: Path) -> None:
    distribution = build(wheel, installed, tmp_path / "overlay")
    assert list(next_vllm.unmet(distribution)) == [f"pytest<1, {version('pytest')} is installed"]


def test_an_overlay_is_made_once_for_an_installation(
    wheel: Path, installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """pip and the command are made up: what they were called with."""
    pips: list[tuple[str, ...]] = []
    commands: list[list[str]] = []

    def pip(*arguments: str) -> None:
        pips.append(arguments)
        if arguments[0] == "download":
            folder = Path(arguments[arguments.index("--dest") + 1])
            (folder / wheel.name).write_bytes(wheel.read_bytes())

    monkeypatch.setattr(next_vllm, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(next_vllm, "NEXT", "9.9.0")
    monkeypatch.setattr(next_vllm, "_pip", pip)
    monkeypatch.setattr(next_vllm, "installed_vllm", lambda: installed)
    monkeypatch.setattr(os, "execvpe", lambda file, command, env: commands.append(command))
    next_vllm.main(["pytest", "x"])
    assert [arguments[0] for arguments in pips] == ["download", "install"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["9.9.0"]
    said = capsys.readouterr().out
    assert "MB, made in" in said and "not tested: pytest<1" in said
    next_vllm.main(["pytest", "y"])
    assert len(pips) == 2 and commands == [["pytest", "x"], ["pytest", "y"]]
    moved = installed.rename(tmp_path / "elsewhere")
    monkeypatch.setattr(next_vllm, "installed_vllm", lambda: moved)
    next_vllm.main(["pytest", "z"])
    assert len(pips) == 4 and (tmp_path / "cache/9.9.0/vllm/_C.abi3.so").samefile(moved / "_C.abi3.so")


def test_there_has_to_be_a_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(next_vllm, "NEXT", vllm_version())
    with pytest.raises(SystemExit, match=r"name a later one in tools/next_vllm\.py"):
        next_vllm.main(["pytest"])
