"""The result file of the check."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

RESULTS_FILE = "gpu-check.json"
Status = Literal["PASS", "FAIL", "SKIP"]


class StageResult(BaseModel):
    """Result of one stage.

    Attributes:
        shows: what a pass means.
        line: summary, or why it failed or was skipped.
        details: depend on the stage.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    stage: str
    status: Status
    seconds: float
    shows: str
    line: str
    details: dict[str, Any] = {}

    def show(self) -> str:
        return f"{self.status}  {self.stage:<9}  {self.seconds:5.0f} s  {self.line}"


class CheckResults(BaseModel):
    """Results of all stages on one machine; `facts` describe it and what is installed."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    device: Literal["cuda", "cpu"]
    facts: dict[str, str]
    stages: tuple[StageResult, ...]

    @classmethod
    def read(cls, file: Path) -> CheckResults:
        """Raises ValueError if `file` holds no results."""
        try:
            return cls.model_validate_json(file.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} is no result of `foldserve gpu-check`: {error}") from error

    @property
    def failed(self) -> int:
        return sum(result.status == "FAIL" for result in self.stages)

    def verdict(self) -> str:
        counts = {status: sum(result.status == status for result in self.stages) for status in ("PASS", "FAIL", "SKIP")}
        return f"{counts['PASS']} passed, {counts['FAIL']} failed, {counts['SKIP']} skipped"
