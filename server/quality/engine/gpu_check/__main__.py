"""Runs one job: `python -m foldserve.server.quality.engine.gpu_check JOB ASKED TOLD`; ASKED and TOLD are JSON files."""

from __future__ import annotations

import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

from foldserve.server.quality.gpu_check.job_runner import ERROR_MARK


def main(job: str, job_file: str, result_file: str) -> None:
    run = import_module(f"{__package__}.{job}").run
    spec = get_type_hints(run)["spec"].model_validate_json(Path(job_file).read_text())
    partial = Path(result_file).with_suffix(".partial")
    partial.write_text(run(spec).model_dump_json(indent=1))
    partial.rename(result_file)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except BaseException as error:
        traceback.print_exc()
        text = " ".join(str(error).split())
        print(f"{ERROR_MARK}{type(error).__name__}: {text}", file=sys.stderr, flush=True)
        sys.exit(1)
