"""`python -m tests.golden DIR`: run every case of a folder of golden vectors; exit status 0 only if none failed."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from tests.golden import HERE, Unsupported, load_cases, load_tables, run_case, run_table


def outcome(name: str, check: Callable[[], None]) -> str:
    """Run one check and print a line unless it passes."""
    try:
        check()
    except Unsupported as reason:
        print(f"unsupported {name}: {reason}")
        return "unsupported"
    except Exception as error:  # a crash of one case must not hide the others
        print(f"FAILED {name}: {error if isinstance(error, AssertionError) else repr(error)}")
        return "failed"
    return "passed"


def summary(checks: Iterable[tuple[str, Callable[[], None]]]) -> tuple[str, int]:
    """Run checks; "N passed, M failed, K unsupported" and M."""
    counts = Counter(outcome(name, check) for name, check in checks)
    return ", ".join(f"{counts[word]} {word}" for word in ("passed", "failed", "unsupported")), counts["failed"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=HERE, metavar="DIR", help="holds manifest.json")
    folder: Path = parser.parse_args(argv).folder
    tables = load_tables(folder)
    told, tables_failed = summary((name, partial(run_table, name, rows)) for name, rows in tables.items())
    print(f"integer tables: {told}")
    told, cases_failed = summary((case.name, partial(run_case, case)) for case in load_cases(folder))
    print(told)
    return int(tables_failed + cases_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
