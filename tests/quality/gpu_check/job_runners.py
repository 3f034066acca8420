"""Implementations of `JobRunner` for tests: one runs jobs in this process, one returns made-up results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from foldserve.server.quality.gpu_check.job_runner import JOBS
from foldserve.server.quality.gpu_check.options import GpuCheckOptions

_T = TypeVar("_T", bound=BaseModel)


@dataclass
class InProcess:
    """Runs the real jobs here, where vLLM is imported already and foldserve registered."""

    folder: Path
    options: GpuCheckOptions = field(default_factory=lambda: GpuCheckOptions(device="cpu"))

    def run(self, name: str, job: str, spec: BaseModel, result: type[_T], **env: str) -> _T:
        told = import_module(f"{JOBS}.{job}").run(spec)
        return result.model_validate_json(told.model_dump_json())


@dataclass
class Scripted:
    """Gives what `answer(name, job, spec)` makes up.

    Attributes:
        ran: (name, spec, env) of each job.
    """

    folder: Path
    answer: Callable[[str, str, Any], BaseModel]
    options: GpuCheckOptions = field(default_factory=GpuCheckOptions)
    ran: list[tuple[str, Any, dict[str, str]]] = field(default_factory=list)

    def run(self, name: str, job: str, spec: BaseModel, result: type[_T], **env: str) -> _T:
        self.ran.append((name, spec, env))
        return result.model_validate_json(self.answer(name, job, spec).model_dump_json())
