"""Golden vectors: inputs and outputs of the authors' released code, and the runner that compares ours with them.

`python -m tests.golden DIR` runs every case that DIR/manifest.json lists. A method is added with one check in `CHECKS`,
an integer table with one in `TABLES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from tests.golden.case import Case, Row, Unsupported, load_cases, load_tables
from tests.golden.folder import check_fold_schedule, check_folder, check_folder_cls, check_ratio
from tests.golden.stf import check_stf
from tests.golden.tower import check_folder_tower
from tests.golden.vtw import check_vtw

HERE = Path(__file__).parent

CHECKS: Mapping[str, Callable[[Case], None]] = {
    "folder": check_folder,
    "folder_cls": check_folder_cls,
    "folder_tower": check_folder_tower,
    "stf": check_stf,
    "vtw": check_vtw,
}

TABLES: Mapping[str, Callable[[Row], None]] = {
    "folder_fold_schedule": check_fold_schedule,
    "ratio_to_r_int": check_ratio,
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


__all__ = ["HERE", "Case", "Unsupported", "load_cases", "load_tables", "run_case", "run_table"]
