"""Golden vectors: inputs and outputs of the authors' released code, and the runner that compares ours with them.

`python -m tests.golden DIR` runs every case that DIR/manifest.json lists. A method is added with one check in `CHECKS`,
an integer table with one in `TABLES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from tests.golden.case import Case, Row, Unsupported, load_cases, load_tables
from tests.golden.diversity import check_cdpruner, check_centered, check_divprune
from tests.golden.folder import check_fold_schedule, check_folder, check_folder_cls, check_ratio
from tests.golden.illava import (
    check_fastv,
    check_fastv_kept,
    check_illava_llm,
    check_illava_removed,
    check_illava_vit,
)
from tests.golden.mmtok import check_mmtok, check_mmtok_keywords
from tests.golden.pixelprune import check_pixelprune, check_pixelprune_image
from tests.golden.pooling import check_pooling
from tests.golden.prumerge import check_prumerge
from tests.golden.stf import check_stf
from tests.golden.tome import check_tome, check_tome_schedule, check_turbo
from tests.golden.tower import check_folder_tower
from tests.golden.video import check_evs, check_evs_count, check_vidcom2, check_vidcom2_count
from tests.golden.visionzip import check_split, check_visionzip, check_visionzip_tower
from tests.golden.vtw import check_vtw

HERE = Path(__file__).parent
FRONTIER = HERE / "frontier"
"""Newer methods, in a folder of their own."""

CHECKS: Mapping[str, Callable[[Case], None]] = {
    "cdpruner": check_cdpruner,
    "divprune": check_divprune,
    "divprune_centered": check_centered,
    "evs": check_evs,
    "fastv": check_fastv,
    "folder": check_folder,
    "folder_cls": check_folder_cls,
    "folder_tower": check_folder_tower,
    "illava_llm": check_illava_llm,
    "illava_vit": check_illava_vit,
    "mmtok": check_mmtok,
    "pixelprune": check_pixelprune,
    "pixelprune_image": check_pixelprune_image,
    "pooling": check_pooling,
    "prumerge": check_prumerge,
    "stf": check_stf,
    "tome": check_tome,
    "turbo": check_turbo,
    "vidcom2": check_vidcom2,
    "visionzip": check_visionzip,
    "visionzip_tower": check_visionzip_tower,
    "vtw": check_vtw,
}

TABLES: Mapping[str, Callable[[Row], None]] = {
    "evs_count": check_evs_count,
    "fastv_keep_round": check_fastv_kept,
    "folder_fold_schedule": check_fold_schedule,
    "illava_r_round": check_illava_removed,
    "mmtok_keywords": check_mmtok_keywords,
    "ratio_to_r_int": check_ratio,
    "tome_parse_r": check_tome_schedule,
    "vidcom2_count": check_vidcom2_count,
    "visionzip_split": check_split,
}


def run_case(case: Case) -> None:
    """Raises AssertionError where our result differs, Unsupported where we have nothing to compare."""
    if case.method not in CHECKS:
        raise Unsupported(f"no check for method {case.method!r}")
    CHECKS[case.method](case)


def run_table(name: str, rows: list[Row]) -> None:
    """Raises like `run_case`, at the first row that differs."""
    if name not in TABLES:
        raise Unsupported("no check for this table")
    for row in rows:
        TABLES[name](row)


__all__ = [
    "CHECKS",
    "FRONTIER",
    "HERE",
    "TABLES",
    "Case",
    "Unsupported",
    "load_cases",
    "load_tables",
    "run_case",
    "run_table",
]
