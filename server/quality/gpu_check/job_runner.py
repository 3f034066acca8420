"""Runs the jobs of stages, each in its own process and within the stage's time limit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ValidationError

from foldserve.server.quality.gpu_check.options import GpuCheckOptions

JOBS = "foldserve.server.quality.engine.gpu_check"
_T = TypeVar("_T", bound=BaseModel)

_RUNNER = {"auto": {}, "v1": {"VLLM_USE_V2_MODEL_RUNNER": "0"}, "v2": {"VLLM_USE_V2_MODEL_RUNNER": "1"}}
_ALWAYS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in the job's own process, where it can be watched
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_FLOAT32_MATMUL_PRECISION": "highest",
    "VLLM_LOGGING_LEVEL": "INFO",
    "HF_HUB_OFFLINE": "1",  # everything is in local folders
}


class StageFailed(Exception):
    """A stage failed. The message is one line; `details` hold the results so far."""

    def __init__(self, message: str, details: Mapping[str, Any] = MappingProxyType({})) -> None:
        super().__init__(message)
        self.details = details


class JobRunner(Protocol):
    @property
    def options(self) -> GpuCheckOptions: ...

    @property
    def folder(self) -> Path:
        """Folder for the stage's files."""

    def run(self, name: str, job: str, spec: BaseModel, result: type[_T], **env: str) -> _T:
        """Runs a job and returns its result; raises Failed if it fails.

        Args:
            name: of the run, in messages and file names.
            job: a module of the package `JOBS`.
            env: environment variables of the job's process.
        """


@dataclass(slots=True)
class ProcessJobRunner:
    """Runs jobs in processes.

    Attributes:
        device_variables: environment variables that the server sets for this device.
        deadline: of the current stage, on the monotonic clock.
    """

    options: GpuCheckOptions
    folder: Path
    device_variables: Mapping[str, str] = field(default_factory=dict)
    deadline: float = 0.0
    limit_s: float = 0.0

    def start_stage(self, seconds: float) -> None:
        """Sets the time limit of the next stage, which begins now."""
        self.limit_s, self.deadline = seconds, time.monotonic() + seconds

    def run(self, name: str, job: str, spec: BaseModel, result: type[_T], **env: str) -> _T:
        job_file, result_file, log = (self.folder / f"{name}.{suffix}" for suffix in ("asked.json", "json", "log"))
        job_file.write_text(spec.model_dump_json())
        result_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", JOBS, job, str(job_file), str(result_file)]
        environment = os.environ | self.device_variables | _ALWAYS | _RUNNER[self.options.model_runner] | env
        with log.open("wb") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
            status = self._wait(process)
        if status is None:
            raise StageFailed(f"{name} was not done within {self.limit_s:.0f} s: {log}")
        if status != 0 or not result_file.is_file():
            raise StageFailed(f"{name} {_ending(status)}: {_last_error(log)} ({log})")
        try:
            return result.model_validate_json(result_file.read_text())
        except ValidationError as error:
            raise StageFailed(
                f"{name} gave another answer than expected: {result_file} ({error.errors()[0]['msg']})"
            ) from error

    def _wait(self, process: subprocess.Popen[bytes]) -> int | None:
        """The exit status; None if time ran out. Then the process and its children are killed."""
        try:
            return process.wait(max(self.deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.returncode is None:  # also if this process is interrupted
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _ending(status: int) -> str:
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"


ERROR_MARK = "gpu-check job failed: "
"""Marks the line of a job's log that holds its final error."""


def _last_error(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    marked = [line.removeprefix(ERROR_MARK) for line in lines if line.startswith(ERROR_MARK)]
    return (marked or lines or ["it said nothing"])[-1].strip()[:300]
