"""The last line of a server that fails is its reason."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError, field_validator

from foldserve.server import guardian
from foldserve.server.api import preflight
from foldserve.server.api.logs.failure import FailureHandler, reason


class Model(BaseModel):
    a: int

    @field_validator("a")
    @classmethod
    def check(cls, value: int) -> int:
        raise ValueError(f"must not be {value}")


def invalid() -> ValidationError:
    with pytest.raises(ValidationError) as caught:
        Model(a=1)
    return caught.value


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\n  lines"), "two lines"),
        (RuntimeError("why"), "why"),
        (OSError(98, "Address already in use"), "[Errno 98] Address already in use"),
        (KeyError("name"), "KeyError: 'name'"),
        (AssertionError(), "AssertionError:"),
        (RuntimeError(), "RuntimeError:"),
        (ValueError("x" * 2000), "x" * 1000 + " ..."),
        (invalid(), "must not be 1"),
    ],
)
def test_a_reason_is_one_line(error: Exception, line: str) -> None:
    assert reason(error) == line


def test_the_first_reason_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLDSERVE_RUN_DIR", str(tmp_path))
    log = logging.getLogger("test_failure")
    log.addHandler(FailureHandler())
    for message, error in (
        ("Invocation of x method failed", "harmless"),
        ("WorkerProc failed to start.", "the cause"),
        ("EngineCore failed to start.", "what followed"),
    ):
        try:
            raise ValueError(error)
        except ValueError:
            log.exception(message)
    assert (tmp_path / "failure").read_text() == "the cause"


@pytest.mark.parametrize("error", [ValueError, OSError, RuntimeError])
@pytest.mark.parametrize("listens", [False, True], ids=["starting", "serving"])
def test_only_a_mistake_at_the_start_shows_no_traceback(
    listens: bool, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOLDSERVE_RUN_DIR", str(tmp_path))
    if listens:
        guardian.report_listening(0)
    is_mistake = not listens and error is not RuntimeError
    with pytest.raises(SystemExit if is_mistake else error), preflight.exit_with_reason():
        raise error("why")
    assert (tmp_path / "failure").read_text() == "why"
