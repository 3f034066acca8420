"""The table of methods and models in docs/reference/methods.md, and in short in the README: `python -m
tests.engine.method_table`, part of `make reference`, writes both anew.

The tests of each family compare its column with what the family says.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vllm.engine.arg_utils import EngineArgs

from foldserve.reducers import METHODS
from foldserve.server.api.catalog import modalities_of
from foldserve.server.engine.families.registry import family_of
from foldserve.server.engine.family import Family
from foldserve.server.engine.plugin import register
from foldserve.server.quality.demo_model import create
from tests import (
    gemma3_checkpoint,
    idefics3_checkpoint,
    intern_checkpoint,
    mmvp_checkpoint,
    next_checkpoint,
    onevision_checkpoint,
    qwen_checkpoint,
    siglip_checkpoint,
    video_checkpoint,
)
from tools.reference.methods import END, PAGE, START

README = Path(__file__).resolve().parents[2] / "README.md"

Write = Callable[[Path, Path], object]
"""Makes a checkpoint in a folder; the second is one of LLaVA-1.5."""

MODELS: Mapping[str, Write] = {
    "LLaVA-1.5": lambda folder, clip: clip.rename(folder),
    "with SigLIP": siglip_checkpoint.write,
    "NeXT": next_checkpoint.write,
    "OneVision": lambda folder, clip: onevision_checkpoint.write(folder),
    "MMVP": mmvp_checkpoint.write,
    "Video-LLaVA": lambda folder, clip: video_checkpoint.write_video_llava(folder),
    "NeXT-Video": lambda folder, clip: video_checkpoint.write_llava_next_video(folder),
    "Qwen2-VL": lambda folder, clip: qwen_checkpoint.write(folder, "qwen2_vl"),
    "Qwen2.5-VL": lambda folder, clip: qwen_checkpoint.write(folder, "qwen2_5_vl"),
    "Qwen3-VL": lambda folder, clip: qwen_checkpoint.write(folder, "qwen3_vl"),
    "Qwen3.5": lambda folder, clip: qwen_checkpoint.write(folder, "qwen3_5"),
    "InternVL": lambda folder, clip: intern_checkpoint.write(folder),
    "Idefics3": lambda folder, clip: idefics3_checkpoint.write(folder, "idefics3"),
    "Gemma-3": lambda folder, clip: gemma3_checkpoint.write(folder),
}

_HOW = "run `make reference`; a new model goes into MODELS (tests/engine/method_table.py) before"


def column(family: Family | None) -> list[str]:
    """For each method `i` for images, `v` for videos, or `-`."""
    return [" ".join(each[0] for each in modalities_of(method, family)) or "-" for method in METHODS.values()]


def assert_documented(model: str, llm: Any) -> None:
    """The page says of this model what its family says."""
    documented = dict(zip(METHODS, _documented(model), strict=True))
    assert documented == dict(zip(METHODS, column(family_of(llm.model_config)), strict=True)), _HOW


def _documented(model: str) -> list[str]:
    head, *rows = _cells()
    assert model in head, f"{PAGE.name} has no column {model!r}: {_HOW}"
    assert [row[0] for row in rows] == [f"`{name}`" for name in METHODS], _HOW
    return [row[head.index(model)] for row in rows]


def _cells() -> list[list[str]]:
    """The page's table, its head first."""
    head, _, *rows = between_marks(PAGE).splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, *rows)]


def between_marks(page: Path) -> str:
    return page.read_text().partition(START)[2].partition(END)[0].strip()


def in_short() -> str:
    """The page's table with one row for methods that work alike, one column for models, and no empty row."""
    columns = _merged(list(zip(*_cells(), strict=True)))
    rows = _merged(list(zip(*columns, strict=True)))
    head, *others = [row for row in rows if set(row[1:]) != {"-"}]
    lines = [head, ["---"] * len(head), *others]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _merged(lines: Sequence[Sequence[str]]) -> list[list[str]]:
    """Lines that differ in their name alone, which comes first, are one with all names."""
    names: dict[tuple[str, ...], list[str]] = {}
    for name, *cells in lines:
        names.setdefault(tuple(cells), []).append(name)
    return [[", ".join(own), *cells] for cells, own in names.items()]


def table(folder: Path) -> str:
    columns = [column(_family(folder, number, write)) for number, write in enumerate(MODELS.values())]
    lines = [["method", *MODELS], ["---", *["---"] * len(MODELS)]]
    lines += [[f"`{name}`", *cells] for name, *cells in zip(METHODS, *columns, strict=True)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _family(folder: Path, number: int, write: Write) -> Family:
    clip = create(folder / f"clip-{number}", image_size=168, num_layers=4)
    write(folder / f"model-{number}", clip)
    family = family_of(EngineArgs(model=str(folder / f"model-{number}")).create_model_config())
    assert family is not None
    return family


def main() -> int:
    register()
    with TemporaryDirectory() as folder:
        made = table(Path(folder))
    _put(PAGE, made)
    _put(README, in_short())
    return 0


def _put(page: Path, made: str) -> None:
    before, _, rest = page.read_text().partition(START)
    page.write_text(f"{before}{START}\n{made}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    sys.exit(main())
