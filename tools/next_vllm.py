"""Runs a command on the next vLLM's Python: `python -m tools.next_vllm COMMAND ...`, for `make test-next`.

A version's CUDA wheel is published before its CPU build, with the same Python code. The command's PYTHONPATH begins
with an overlay: the wheel's Python code and the compiled libraries of the installed vLLM. The environment is unchanged.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, PathDistribution, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from packaging.requirements import Requirement

from foldserve.server.engine.plugin import ALLOW_VLLM, vllm_version

NEXT = "0.33.0"
NEW_PACKAGES = ("orjson>=3.11.6",)
"""Packages that NEXT imports and the installed vLLM does not require."""

CACHE = Path(__file__).resolve().parent.parent / ".next-vllm"
_ELF = b"\x7fELF"


def main(command: list[str]) -> None:
    """Replaces this process by the command."""
    if not command:
        sys.exit(__doc__)
    if vllm_version() == NEXT:
        sys.exit(f"next vLLM: {NEXT} is what this release is for; name a later one in tools/next_vllm.py")
    overlay = CACHE / NEXT
    installed = installed_vllm()
    stamp, wanted = overlay / "made-for", f"{version('vllm')} {installed} {' '.join(NEW_PACKAGES)}"
    if not stamp.is_file() or stamp.read_text() != wanted:
        _make(overlay, installed)
        stamp.write_text(wanted)
    os.execvpe(command[0], command, os.environ | environment(overlay))


def environment(overlay: Path) -> dict[str, str]:
    """Environment variables that make Python find the overlay and foldserve accept it."""
    paths = [str(overlay), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths)), ALLOW_VLLM: NEXT}


def installed_vllm() -> Path:
    """The directory of the installed package, without importing it."""
    spec = find_spec("vllm")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _make(overlay: Path, installed: Path) -> None:
    """Downloads the wheel and builds the overlay, which appears only when it is complete, except for its stamp."""
    began = time.monotonic()
    _say(f"downloading the wheel of vLLM {NEXT} (some 340 MB)")
    CACHE.mkdir(exist_ok=True)
    with TemporaryDirectory(dir=CACHE) as name:
        folder = Path(name)
        _pip("download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), f"vllm=={NEXT}")
        (wheel,) = folder.glob("*.whl")
        made = folder / "overlay"
        untested = list(unmet(build(wheel, installed, made, local=version("vllm").partition("+")[2])))
        _pip("install", "--no-deps", "--target", str(made), *NEW_PACKAGES)
        shutil.rmtree(overlay, ignore_errors=True)
        made.rename(overlay)
    size = sum(file.lstat().st_size for file in overlay.rglob("*") if file.is_file())
    _say(f"{overlay}: {size / 1e6:.0f} MB, made in {time.monotonic() - began:.0f} s")
    _say(f"compiled libraries from {installed}")
    for line in untested:
        _say(f"not tested: {line}")


def build(wheel: Path, installed: Path, overlay: Path, local: str = "") -> Distribution:
    """Unpacks a vLLM wheel without compiled libraries, and links those of the installed vLLM.

    Args:
        installed: directory of the installed package `vllm`.
        local: local version, added after a "+"; vLLM finds its platform by it.

    Returns:
        The overlay's distribution.
    """
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            if member.filename.startswith("vllm/") and not _is_compiled(archive, member):
                archive.extract(member, overlay)
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        text = archive.read(name).decode()
    for library in installed.rglob("*.so"):
        link = overlay / "vllm" / library.relative_to(installed)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(library)
    number = name.partition("-")[2].removesuffix(".dist-info/METADATA")
    whole = f"{number}+{local}" if local else number
    info = overlay / f"vllm-{whole}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(text.replace(f"\nVersion: {number}\n", f"\nVersion: {whole}\n", 1))
    return PathDistribution(info)


def _is_compiled(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bool:
    with archive.open(member) as file:
        return file.read(len(_ELF)) == _ELF


def unmet(distribution: Distribution) -> Iterator[str]:
    """Requirements installed in another version. Those not installed at all are for GPUs, or fail on import."""
    for requirement in map(Requirement, distribution.requires or ()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            yield f"{requirement.name}{requirement.specifier}, {found} is installed"


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--disable-pip-version-check", "--quiet"]
    if subprocess.run(command, check=False).returncode != 0:
        sys.exit(f"next vLLM: pip {' '.join(arguments)} failed; its error is above")


def _say(message: str) -> None:
    print(f"next vLLM: {message}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
