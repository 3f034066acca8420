"""The kit for bare GPU machines: sizes, what is left out, and the way there and back, with made-up wheels."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.gpu import bootstrap, fatbin, pack
from tools.gpu.parts import MIB, cut, require_size

SMALL, BESIDE = 64 * 1024, 1000


@given(st.lists(st.integers(1, 5 * MIB), min_size=1, max_size=4), st.integers(SMALL + BESIDE, 2 * MIB))
def test_parts_hold_everything_once_within_the_limit(sizes: list[int], limit: int) -> None:
    archives = {str(i): size for i, size in enumerate(sizes)}
    parts = cut(archives, limit, BESIDE)
    for part in parts:
        assert 0 < sum(piece.end - piece.start for piece in part) <= limit - BESIDE
    for name, size in archives.items():
        pieces = [piece for part in parts for piece in part if piece.archive == name]
        assert [piece.start for piece in pieces] == [0, *(piece.end for piece in pieces[:-1])]
        assert pieces[-1].end == size
    for part in parts[:-1]:  # only a rest that is not worth a file stays empty
        assert sum(piece.end - piece.start for piece in part) > limit - BESIDE - SMALL


def test_a_limit_without_room() -> None:
    with pytest.raises(ValueError, match="no room"):
        cut({"a": 1}, SMALL, BESIDE)


def test_a_part_that_is_too_large() -> None:
    require_size({"part-0": MIB, "part-1": MIB}, MIB)
    with pytest.raises(ValueError, match=r"part-1 has 1\.50 MiB, more than the limit of 1\.00 MiB"):
        require_size({"part-0": MIB, "part-1": 3 * MIB // 2}, MIB)


def entry(kind: int, capability: int, code: bytes) -> bytes:
    header = struct.pack("<HHIQ", kind, 1, 64, len(code)) + bytes(12) + struct.pack("<I", capability)
    return header + bytes(64 - len(header)) + code


def container(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


@pytest.mark.parametrize(
    ("entries", "kept", "kind"),
    [
        ([(2, 80, b"a" * 8), (2, 90, b"b" * 8), (1, 90, b"c" * 8)], [1], "machine code"),
        ([(2, 90, b"a" * 8), (2, 90, b"b" * 8)], [0, 1], "machine code"),
        ([(2, 80, b"a" * 8), (1, 70, b"b" * 8), (1, 80, b"c" * 8), (1, 100, b"d" * 8)], [2], "PTX"),
        ([(2, 100, b"a" * 32), (2, 103, b"b" * 16)], [1], "for other GPUs"),
    ],
    ids=str,
)
def test_code_for_one_gpu_stays(entries: list[tuple[int, int, bytes]], kept: list[int], kind: str) -> None:
    made = [entry(*each) for each in entries]
    before, after = b"\x7fELF" + bytes(100), b"symbols"
    library = before + container(*made) + after
    pruned, counts = fatbin.prune(library, 90)
    wanted = container(*(made[i] for i in kept))
    assert pruned == before + wanted + bytes(len(container(*made)) - len(wanted)) + after
    assert counts == {kind: 1}
    assert fatbin.prune(pruned, 90)[0] == pruned


@pytest.mark.parametrize(
    "library",
    [
        b"no container",
        struct.pack("<IHHQ", 0xBA55ED50, 1, 16, 1 << 40),  # longer than the file
        container(entry(2, 80, b"a" * 8))[:-1],
        container(entry(7, 80, b"a" * 8)),  # of a kind that is not known
        container(entry(2, 80, b"a" * 8) + b"more"),
    ],
    ids=range(5),
)
def test_what_is_not_understood_stays_as_it_is(library: bytes) -> None:
    assert fatbin.prune(library, 90)[0] == library


def wheel(folder: Path, name: str, files: dict[str, bytes]) -> Path:
    file = folder / f"{name}-1-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for path, data in files.items():
            archive.writestr(path, data)
    return file


@pytest.fixture
def wheels(tmp_path: Path) -> list[Path]:
    """vLLM with a library for two GPUs, a package, and foldserve."""
    noise = random.Random(0).randbytes
    library = bytes(100) + container(entry(2, 80, noise(MIB)), entry(2, 90, noise(300_000))) + b"end"
    folder = tmp_path / "wheels"
    folder.mkdir()
    vllm = {
        "vllm/__init__.py": b"x = 1\n",
        "vllm/_C.abi3.so": library,
        "vllm/_moe_C.abi3.so": b"experts",
        "vllm/a.h": b"kept",
        "vllm-1.dist-info/METADATA": b"Name: vllm",
        "vllm-1.dist-info/RECORD": b"list",
    }
    other = {
        "other/__init__.py": b"",
        "other/tests/big.py": b"x",
        "other/a.h": b"x",
        "other-1.data/purelib/more.py": b"y = 2\n",
        "other-1.data/scripts/run": b"x",
    }
    ours = {"foldserve/tests/__init__.py": b"kept", "foldserve-1.dist-info/entry_points.txt": b"[x]"}
    return [wheel(folder, name, files) for name, files in {"vllm": vllm, "other": other, "foldserve": ours}.items()]


INSTALLED = {
    "vllm/__init__.py",
    "vllm/_C.abi3.so",
    "vllm/a.h",
    "vllm-1.dist-info/METADATA",
    "other/__init__.py",
    "more.py",
    "foldserve/tests/__init__.py",
    "foldserve-1.dist-info/entry_points.txt",
}
LIMIT = 240 * 1024


def packed(wheels: list[Path], tmp_path: Path, **settings: object) -> list[Path]:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    chosen = pack.KitSettings(**{"limit": LIMIT} | settings)  # type: ignore[arg-type]
    pack.pack(wheels, tmp_path / "out", chosen, scratch)
    return sorted((tmp_path / "out").iterdir())


def test_there_and_back(wheels: list[Path], tmp_path: Path) -> None:
    parts = packed(wheels, tmp_path)
    assert len(parts) > 1
    assert all(sum(file.stat().st_size for file in part.iterdir()) <= LIMIT for part in parts)
    stash, dest = tmp_path / "stash", tmp_path / "site"
    *earlier, last = reversed(parts)
    for part in earlier:
        assert bootstrap.unpack(part, stash, dest) and not dest.exists()
    assert bootstrap.unpack(last, stash, dest) == []
    found = {str(file.relative_to(dest)) for file in dest.rglob("*") if file.is_file()}
    assert found == INSTALLED | {".kit.json"}
    library = (dest / "vllm/_C.abi3.so").read_bytes()
    with zipfile.ZipFile(wheels[0]) as archive:
        original = archive.read("vllm/_C.abi3.so")
    assert library == fatbin.prune(original, 90)[0] and len(library) == len(original)
    assert not stash.exists()
    (dest / "more.py").write_text("changed")
    assert bootstrap.unpack(parts[0], stash, dest) == []  # it is there already
    assert (dest / "more.py").read_text() == "changed"


def test_the_file_in_a_part_runs_by_itself(wheels: list[Path], tmp_path: Path) -> None:
    part, *_ = packed(wheels, tmp_path)
    command = [sys.executable, "-I", str(part / "bootstrap.py"), "--dest", "site", "--stash", "stash"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("waiting for ")


def test_a_damaged_piece_is_noticed(wheels: list[Path], tmp_path: Path) -> None:
    parts = packed(wheels, tmp_path, limit=4 * MIB)
    (part,) = parts
    piece = part / "libraries.tar.xz.00"
    data = bytearray(piece.read_bytes())
    data[len(data) // 2] ^= 1
    piece.write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged: one of libraries\.tar\.xz\.00"):
        bootstrap.unpack(part, tmp_path / "stash", tmp_path / "site")
    assert not (tmp_path / "stash" / piece.name).exists() and not (tmp_path / "site" / ".kit.json").exists()


def test_more_parts_than_may_be(wheels: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"take \d parts of 0\.234375 MiB, but --parts is 1"):
        packed(wheels, tmp_path, most_parts=1)
    assert not (tmp_path / "out").exists()


def test_what_the_machine_has_stays_out(wheels: list[Path], tmp_path: Path) -> None:
    (part,) = packed(wheels, tmp_path, limit=4 * MIB, have=frozenset({"other"}))
    bootstrap.unpack(part, tmp_path / "stash", tmp_path / "site")
    assert not (tmp_path / "site" / "other").exists() and (tmp_path / "site" / "vllm").is_dir()


def test_the_command(wheels: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    have = tmp_path / "there.txt"
    have.write_text("# a comment\nOther @ file:///x\ntorch==2.13.0\n")
    ours = wheels.pop()
    out = tmp_path / "kit"
    given = [str(out), str(ours), "--wheels", str(ours.parent), "--have", str(have), "--limit-mib"]
    ours.rename(tmp_path / ours.name)
    given[1] = str(tmp_path / ours.name)
    pack.main([*given, "1"])
    assert "part-0: 0." in capsys.readouterr().out
    manifest = json.loads((out / "part-0" / "manifest.json").read_text())
    assert set(manifest) == {"libraries", "code"}
    with pytest.raises(SystemExit):
        pack.main([str(tmp_path / "kit2"), *given[1:], "0.2", "--parts", "1"])
    assert "raise --limit-mib" in capsys.readouterr().err


def test_requirements_are_pinned() -> None:
    lines = (pack.HERE / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert pins == sorted(pins, key=lambda pin: pin.partition("==")[0])
    assert all(line.count("==") == 1 for line in pins)
    assert not {"torch", "triton", "vllm"} & set(pack._names("\n".join(pins)))
