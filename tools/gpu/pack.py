"""Packs all that a bare GPU machine needs to run foldserve: `python -m tools.gpu.pack OUT FOLDSERVE_WHEEL`.

Fetches vLLM's CUDA wheel and the packages of `requirements.txt`, leaves out files that serving LLaVA never opens and
code for other GPUs, and packs the rest in parts. README.md has the next steps.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from foldserve.server.engine.plugin import vllm_version
from tools.gpu import bootstrap, fatbin
from tools.gpu.parts import MIB, cut, require_size

HERE = Path(__file__).parent
_PLATFORMS = ("2_31", "2_28", "2_27", "2_26", "2_24", "2_17", "2_5")

_VLLM_UNUSED = (
    "vllm/third_party/deep_gemm/",
    "vllm/third_party/fmha_sm100/",
    "vllm/third_party/tml_fa4/",
    "vllm/vllm-rs",
    "vllm/benchmarks/",
    "vllm/kernels/helion/configs/",
    "vllm/_qutlass_C",
    "vllm/_flashkda_C",
    "vllm/_flashmla_",
    "vllm/_deepselect_C",
    "vllm/_moe_C",
    "vllm/vllm_flash_attn/_vllm_fa2_C",  # one of 2 and 3 has to be there
    "vllm/entrypoints/serve/instrumentator/static/",
)
_UNUSED = ("/tests/", "/test/", "/include/", "/benchmarks/", "pycountry/locales/", "mistral_common/data/")
_UNUSED_SUFFIXES = (".pyi", ".pyc", ".h", ".a")
_LARGE_LIBRARY = MIB


@dataclass(frozen=True, slots=True)
class KitSettings:
    """Attributes:
    limit: most bytes of a part.
    most_parts: None: no limit.
    capability: compute capability of the GPU, 90 for 9.0.
    have: names of packages that the machine already has.
    """

    limit: int
    most_parts: int | None = None
    capability: int = 90
    have: frozenset[str] = frozenset()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.pack", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="gets part-0, part-1, ...; must not exist")
    parser.add_argument("wheel", type=Path, metavar="FOLDSERVE_WHEEL", help="of `pip wheel --no-deps .`")
    parser.add_argument("--limit-mib", type=float, default=60, help="size of a part (%(default)g)")
    parser.add_argument("--parts", type=int, help="more than so many are an error")
    parser.add_argument("--capability", default="9.0", help="of the GPU, as nvidia-smi names it (%(default)s)")
    parser.add_argument("--have", type=Path, help="`pip freeze` of the machine: what is there stays out")
    parser.add_argument("--vllm", default=vllm_version(), help="version of its CUDA wheel (%(default)s)")
    parser.add_argument("--wheels", type=Path, help="folder with all wheels, vLLM's too: nothing is fetched")
    args = parser.parse_args(argv)
    have = frozenset(_names(args.have.read_text())) if args.have else frozenset[str]()
    settings = KitSettings(int(args.limit_mib * MIB), args.parts, int(args.capability.replace(".", "")), have)
    try:
        with tempfile.TemporaryDirectory(prefix="foldserve-kit-") as scratch:
            wheels = args.wheels or _fetch(Path(scratch) / "wheels", args.vllm, have)
            pack([args.wheel, *sorted(wheels.glob("*.whl"))], args.out, settings, Path(scratch))
    except ValueError as error:
        parser.error(str(error))


def pack(wheels: Iterable[Path], out: Path, settings: KitSettings, scratch: Path) -> None:
    """Writes the parts; ValueError, with nothing left behind, if they are too many or too large."""
    site = scratch / "site"
    for wheel in wheels:
        if _name(wheel.name.partition("-")[0]) not in settings.have:
            unpack_wheel(wheel, site, settings.capability)
    archives = _archive(site, scratch)
    manifest = {name: {"sha256": _sha256(file), "pieces": list[str]()} for name, file in archives.items()}
    beside = Path(bootstrap.__file__).stat().st_size + 64 * 1024  # manifest
    parts = cut({name: file.stat().st_size for name, file in archives.items()}, settings.limit, beside)
    if settings.most_parts is not None and len(parts) > settings.most_parts:
        total = sum(file.stat().st_size for file in archives.values())
        raise ValueError(
            f"{total / MIB:.1f} MiB take {len(parts)} parts of {settings.limit / MIB:g} MiB, but --parts is "
            f"{settings.most_parts}: raise --limit-mib, or give --have"
        )
    out.mkdir(parents=True)
    try:
        for number, pieces in enumerate(parts):
            folder = out / f"part-{number}"
            folder.mkdir()
            for piece in pieces:
                names = manifest[piece.archive]["pieces"]
                assert isinstance(names, list)
                names.append(f"{piece.archive}.tar.xz.{len(names):02}")
                with archives[piece.archive].open("rb") as file:
                    file.seek(piece.start)
                    (folder / names[-1]).write_bytes(file.read(piece.end - piece.start))
        for number in range(len(parts)):
            (out / f"part-{number}" / bootstrap.MANIFEST).write_text(json.dumps(manifest))
            shutil.copy(bootstrap.__file__, out / f"part-{number}")
        sizes = {folder.name: sum(file.stat().st_size for file in folder.iterdir()) for folder in sorted(out.iterdir())}
        require_size(sizes, settings.limit)
    except BaseException:
        shutil.rmtree(out)
        raise
    for name, size in sizes.items():
        print(f"{out / name}: {size / MIB:.1f} MiB")


def unpack_wheel(wheel: Path, site: Path, capability: int) -> None:
    """Installs a wheel as pip would, without unused files, and libraries with code for one GPU only."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            target = _installed_as(name)
            if target is None or name.endswith("/") or _is_unused(target):
                continue
            data = archive.read(name)
            if target.endswith(".so") and len(data) > _LARGE_LIBRARY:
                data, counts = fatbin.prune(data, capability)
                if counts:
                    print(f"{target}: {', '.join(f'{count} {kind}' for kind, count in counts.items())}")
            file = site / target
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            file.chmod(0o755 if ".so" in file.name else 0o644)


def _installed_as(name: str) -> str | None:
    """Path of a wheel's file in site-packages; None for scripts and the like."""
    folder, *rest = PurePosixPath(name).parts
    if not folder.endswith(".data"):
        return name
    return "/".join(rest[1:]) if rest and rest[0] in ("purelib", "platlib") else None


def _is_unused(name: str) -> bool:
    if name.endswith("/RECORD"):  # lists what is left out here
        return True
    if name.startswith(("vllm/", "foldserve/")):
        return name.startswith(_VLLM_UNUSED)
    return name.endswith(_UNUSED_SUFFIXES) or any(part in f"/{name}" for part in _UNUSED)


def _archive(site: Path, scratch: Path) -> dict[str, Path]:
    """Name -> archive; two archives, for libraries and code, are compressed in parallel."""
    groups: dict[str, list[Path]] = {"libraries": [], "code": []}
    for file in sorted(site.rglob("*"), key=lambda file: (file.suffix, file)):
        if file.is_file():
            groups["libraries" if ".so" in file.name else "code"].append(file)
    archives = {name: scratch / f"{name}.tar.xz" for name, files in groups.items() if files}
    with ProcessPoolExecutor(2) as processes:
        jobs = [processes.submit(_compress, site, groups[name], file) for name, file in archives.items()]
        for job in jobs:
            job.result()
    return archives


def _compress(site: Path, files: Sequence[Path], archive: Path) -> None:
    """Deterministic: the same files give the same archive."""
    with (
        lzma.open(archive, "wb", preset=9 | lzma.PRESET_EXTREME) as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        for file in files:
            info = tar.gettarinfo(file, arcname=str(file.relative_to(site)))
            info.uid = info.gid = 0
            info.uname = info.gname = ""
            info.mtime = 0
            with file.open("rb") as data:
                tar.addfile(info, data)


def _fetch(folder: Path, vllm: str, have: frozenset[str]) -> Path:
    text = (HERE / "requirements.txt").read_text()
    wanted = [line for line in text.split("\n") if line[:1].isalnum() and not set(_names(line)) & have]
    platforms = [f"manylinux_{version}_x86_64" for version in _PLATFORMS] + ["manylinux2014_x86_64"]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    python = ["--python-version", "3.12", "--implementation", "cp"]
    where = [word for platform in platforms for word in ("--platform", platform)]
    subprocess.run([*pip, *python, *where, "--dest", str(folder), f"vllm=={vllm}", *wanted], check=True)
    return folder


def _names(text: str) -> Iterator[str]:
    """Package names in lines such as `name==1` or `name @ file:...`."""
    for line in text.splitlines():
        if found := re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", line):
            yield _name(found[0])


def _name(package: str) -> str:
    return re.sub("[-_.]+", "-", package).lower()


def _sha256(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


if __name__ == "__main__":
    main()
