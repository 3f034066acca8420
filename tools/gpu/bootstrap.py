"""Unpacks the kit beside this file on a machine without a network: `python3 bootstrap.py --dest SITE`.

Standard library only, since `pack` puts this file into every part. Parts may come one by one: each call keeps the
pieces beside it in `--stash` until all are there. If the kit is already unpacked, it does nothing.
"""

from __future__ import annotations

import argparse
import compileall
import hashlib
import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from py_compile import PycInvalidationMode

MANIFEST = "manifest.json"
_STAMP = ".kit.json"
_IMPORTS = ("torch", "triton", "transformers", "vllm", "foldserve")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dest", type=Path, default=Path("site"), help="gets the packages: goes on PYTHONPATH (%(default)s)"
    )
    parser.add_argument("--stash", type=Path, default=Path("kit-pieces"), help="keeps pieces meanwhile (%(default)s)")
    args = parser.parse_args()
    missing = unpack(Path(__file__).resolve().parent, args.stash, args.dest)
    if missing:
        print("waiting for", *missing)
        return
    compileall.compile_dir(args.dest, quiet=2, workers=0, invalidation_mode=PycInvalidationMode.UNCHECKED_HASH)
    print(f"unpacked into {args.dest}: export PYTHONPATH={args.dest.resolve()}", flush=True)
    code = "from importlib.metadata import version\n" + "".join(
        f"import {name}\nprint('{name}', version('{name}'))\n" for name in _IMPORTS
    )
    env = os.environ | {"PYTHONPATH": str(args.dest.resolve())}
    sys.exit(subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode)


def unpack(here: Path, stash: Path, dest: Path) -> list[str]:
    """Returns the pieces that are still missing; none if `dest` now holds the kit.

    Raises:
        ValueError: a piece is damaged; all pieces of its archive are removed from the stash.
    """
    manifest: dict[str, dict[str, object]] = json.loads((here / MANIFEST).read_text())
    stamp = dest / _STAMP
    if stamp.is_file() and json.loads(stamp.read_text()) == manifest:
        return []
    stash.mkdir(parents=True, exist_ok=True)
    pieces = [str(piece) for archive in manifest.values() for piece in _pieces(archive)]
    for piece in pieces:
        if (here / piece).is_file():
            shutil.copy(here / piece, stash / f"{piece}.partial")
            (stash / f"{piece}.partial").replace(stash / piece)
    if missing := [piece for piece in pieces if not (stash / piece).is_file()]:
        return missing
    dest.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(max(1, min(len(manifest), os.cpu_count() or 1))) as processes:
        list(processes.map(_unpack, *zip(*((stash, dest, archive) for archive in manifest.values()), strict=True)))
    stamp.write_text(json.dumps(manifest))
    shutil.rmtree(stash)
    return []


def _pieces(archive: dict[str, object]) -> list[str]:
    pieces = archive["pieces"]
    assert isinstance(pieces, list)
    return [str(piece) for piece in pieces]


def _unpack(stash: Path, dest: Path, archive: dict[str, object]) -> None:
    joined = stash / f"{_pieces(archive)[0]}.whole"
    digest = hashlib.sha256()
    with joined.open("wb") as whole:
        for piece in _pieces(archive):
            data = (stash / piece).read_bytes()
            digest.update(data)
            whole.write(data)
    if digest.hexdigest() != archive["sha256"]:
        for piece in _pieces(archive):
            (stash / piece).unlink()
        raise ValueError(f"damaged: one of {', '.join(_pieces(archive))}; carry them again")
    with lzma.open(joined) as plain, tarfile.open(fileobj=plain, mode="r|") as tar:
        tar.extractall(dest, filter="data")


if __name__ == "__main__":
    main()
