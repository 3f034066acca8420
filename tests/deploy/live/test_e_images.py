"""The RUN steps of the Dockerfiles, word by word, in fresh virtual environments: no Docker engine is needed.

Left out is what only an image has: packages of its distribution, users, and directories that belong to them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Collection, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution, requires
from io import BytesIO
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.deploy.files import ROOT

_ONLY_IN_AN_IMAGE = re.compile(r"apt-get |useradd |install -d |rm -rf /var/")


class Image:
    """A Dockerfile and a folder that stands for the image's file system.

    Args:
        unset: build arguments that are given no value, not even the file's default.
    """

    def __init__(self, name: str, folder: Path, unset: Collection[str] = ()) -> None:
        self._folder = folder
        self._read(name, unset)
        for part in ("wheels", "tmp"):
            (folder / part).mkdir()
        _copy_context(folder / "src")
        venv.create(folder / "venv", with_pip=True)
        self.python = folder / "venv" / "bin" / "python3"

    def _read(self, name: str, unset: Collection[str]) -> None:
        self._steps = DockerfileParser(fileobj=BytesIO((ROOT / name).read_bytes())).structure
        defaults = dict(value.split("=", 1) for value in self._values("ARG") if "=" in value)
        self._arguments = {name: value for name, value in defaults.items() if name not in unset}

    def build_on_top(self, name: str) -> None:
        """Runs every RUN instruction of a Dockerfile that begins with this image."""
        self._read(name, ())
        self.build()

    def build(self) -> None:
        """Runs every RUN instruction."""
        for step in self._values("RUN"):
            commands = re.split(r"\s*&&\s*", re.sub(r"--mount=\S+\s+", "", step))
            kept = " && ".join(command for command in commands if not _ONLY_IN_AN_IMAGE.match(command))
            if kept:
                self.run(re.sub(r"(?<![\w.])/(wheels|tmp)\b", rf"{self._folder}/\1", kept))

    def run(self, script: str) -> str:
        """Standard output of a shell script in the image, which has to succeed."""
        own = {
            "PATH": f"{self.python.parent}:/usr/bin:/bin",
            "TMPDIR": str(self._folder / "tmp"),
            "PYTHONSAFEPATH": "1",
        }
        env = {**os.environ, **self._arguments, **own}
        command = ["bash", "-euc", script]
        done = subprocess.run(command, cwd=self._folder / "src", env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout

    def packages(self) -> set[str]:
        return set(self.run("python3 -m pip list --format=freeze --disable-pip-version-check").split())

    def _values(self, instruction: str) -> list[str]:
        return [step["value"] for step in self._steps if step["instruction"] == instruction]


def _copy_context(folder: Path) -> None:
    """What `COPY . .` copies."""
    folder.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        source = ROOT / line[1:]
        if line.startswith("!") and source.is_dir():
            shutil.copytree(source, folder / line[1:], symlinks=True, ignore=ignored)
        elif line.startswith("!") and source.exists():
            shutil.copy(source, folder)


def _needed(name: str) -> Iterator[str]:
    """Installed distributions that one needs, itself included: what an image with just that one has."""
    waiting, seen = [(name, "")], set()
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        with suppress(PackageNotFoundError):
            for text in requires(name) or []:
                needed = Requirement(text)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    waiting += [(canonicalize_name(needed.name), also) for also in ("", *needed.extras)]
            if not extra:
                yield distribution(name).metadata["Name"]


def _link(name: str, site: Path) -> None:
    """Puts a distribution's files into another environment; links, since some have gigabytes."""
    found = distribution(name)
    assert found.files is not None
    for file in found.files:
        source, target = Path(str(found.locate_file(file))), site / file
        if ".." in file.parts or "__pycache__" in file.parts or target.exists() or not source.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:  # another file system
            shutil.copy(source, target)


_IMPORTS = "import foldserve.server.api.plugin, foldserve.server.engine.families.llava as it; print(it.__file__)"


def test_the_gpu_images_steps_on_what_vllm_brings(tmp_path: Path) -> None:
    image = Image("Dockerfile", tmp_path)
    site = Path(image.run("python3 -c 'import sysconfig; print(sysconfig.get_path(\"purelib\"))'").strip())
    image.run("python3 -m pip uninstall --quiet --yes setuptools")  # of the environment; vLLM brings its own
    for name in _needed("vllm"):
        _link(name, site)
    before = image.packages()
    assert any(package.startswith("torch==") for package in before)
    assert not any(package.startswith("foldserve==") for package in before)
    image.build()
    after = image.packages()
    print("installed on vLLM's image:", *sorted(after - before))
    assert before < after  # nothing of vLLM's was replaced
    assert any(package.startswith("foldserve==") for package in after - before)
    assert "0.32.0" in image.run("foldserve --version")
    assert image.run(f"python3 -c '{_IMPORTS}'").strip().startswith(str(site))
    image.build_on_top("deploy/Dockerfile.ray")
    with_ray = image.packages()
    print("installed with Ray:", *sorted(with_ray - after))
    assert {package for package in after - with_ray if not package.startswith("ray==")} == set()
    image.run(
        "python3 -c 'import foldserve.server.api.batch.ray_job, ray.data.checkpoint, ray.dashboard.modules.job.sdk'"
    )


def test_the_cpu_images_steps_on_nothing(tmp_path: Path) -> None:
    image = Image("deploy/Dockerfile.cpu", tmp_path, unset=_of_this_pip(tmp_path))
    image.build()
    assert {"vllm==0.32.0+cpu", "torch==2.13.0+cpu"} < image.packages()
    assert "vLLM 0.32.0" in image.run("foldserve --version")
    assert str(tmp_path) in image.run(f"python3 -c '{_IMPORTS}'")


def _of_this_pip(folder: Path) -> list[str]:
    """Leaves PyTorch's index out where pip's own sources have torch for CPU, as `make setup` does."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder / "torch")]
    has = subprocess.run([*pip, "torch==2.13.0+cpu"], capture_output=True, check=False).returncode == 0
    shutil.rmtree(folder / "torch", ignore_errors=True)
    return ["PIP_EXTRA_INDEX_URL"] if has else []


@pytest.mark.parametrize(
    ("name", "steps"), [("Dockerfile", 1), ("deploy/Dockerfile.cpu", 4), ("deploy/Dockerfile.ray", 2)]
)
def test_no_step_is_left_out_by_mistake(name: str, steps: int) -> None:
    text = " ".join(step["value"] for step in DockerfileParser(fileobj=BytesIO((ROOT / name).read_bytes())).structure)
    left_out = [part for part in re.split(r"\s*&&\s*", text) if _ONLY_IN_AN_IMAGE.match(part)]
    assert len(left_out) == steps
