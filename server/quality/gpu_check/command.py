"""`foldserve gpu-check` from its options to the files that it writes."""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping

from foldserve.server.quality.gpu_check.job_runner import ProcessJobRunner, StageFailed
from foldserve.server.quality.gpu_check.options import STAGES, GpuCheckOptions
from foldserve.server.quality.gpu_check.page import write_page
from foldserve.server.quality.gpu_check.result import RESULTS_FILE, CheckResults, StageResult, Status
from foldserve.server.quality.gpu_check.stages import ALL, CPU_LIMIT_S, CheckStage

_LEAST_S = 20.0
"""Time that an engine takes to start: with less left, a stage can only fail."""


def run(options: GpuCheckOptions, facts: Mapping[str, str], device_variables: Mapping[str, str]) -> CheckResults:
    """Runs the stages, prints a line for each, and writes the results.

    Args:
        facts: about the machine and what is installed.
        device_variables: environment variables that the server sets for this device.
    """
    jobs = options.output / "jobs"
    jobs.mkdir(parents=True, exist_ok=True)
    job_runner = ProcessJobRunner(options, jobs.absolute(), device_variables)
    end = None if options.budget is None else time.monotonic() + options.budget
    found: list[StageResult] = []
    for name in STAGES:
        if name in options.stages:
            found.append(_run(ALL[name], job_runner, None if end is None else end - time.monotonic()))
            print(found[-1].show(), flush=True)
            results = CheckResults(device=options.device, facts=dict(facts), stages=tuple(found))
            text = results.model_dump_json(indent=1)
            (options.output / RESULTS_FILE).write_text(f"{text}\n")  # after each stage, in case this process is killed
    write_page(results, options.output)
    return results


def _run(stage: CheckStage, job_runner: ProcessJobRunner, left_s: float | None) -> StageResult:
    """Runs or skips a stage; `left_s` is what is left of the budget for all stages, None without one."""
    options = job_runner.options
    skipped = ""
    if options.device == "cpu" and stage.needs_gpu and not (stage.name == "load" and options.model):
        skipped = stage.needs_gpu
    elif left_s is not None and left_s < _LEAST_S:
        skipped = f"--budget {options.budget:g} is used up"
    if skipped:
        return StageResult(stage=stage.name, status="SKIP", seconds=0, shows=stage.shows, line=skipped)
    limit = stage.limit_s if options.device == "cuda" else CPU_LIMIT_S
    job_runner.start_stage(limit if left_s is None else min(limit, left_s))
    status: Status
    started = time.monotonic()
    try:
        passed = stage.run(job_runner)
        status, line, details = "PASS", passed.line, passed.details
    except StageFailed as failed:
        status, line, details = "FAIL", str(failed), failed.details
    except Exception as fault:  # a bug in the stage: the others go on
        traceback.print_exc()
        status, line, details = "FAIL", f"{type(fault).__name__}: {fault}", {}
    seconds = time.monotonic() - started
    return StageResult(
        stage=stage.name, status=status, seconds=seconds, shows=stage.shows, line=line, details=dict(details)
    )
