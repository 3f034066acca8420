"""The comparison of two results, and the order of measured start-ups."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from foldserve.loadtest.micro.compare import compare, main, render
from foldserve.loadtest.micro.startup import measure

BASE = {
    "rows": [
        {"method": "folder", "tokens": 576, "ms": 10.0, "cpu": {"value": 1.0, "low": 0.9, "high": 1.1}},
        {"method": "pool", "tokens": 576, "ms": 2.0, "cpu": {"value": 1.0, "low": 0.9, "high": 1.1}},
    ],
    "machine": {"cpus": 2},
}
HEAD = {
    "rows": [
        {"method": "pool", "tokens": 576, "ms": 2.0, "cpu": {"value": 1.05, "low": 1.0, "high": 1.2}},
        {"method": "folder", "tokens": 576, "ms": 5.0, "cpu": {"value": 0.5, "low": 0.4, "high": 0.6}},
        {"method": "new", "tokens": 576, "ms": 1.0},
    ],
    "machine": {"cpus": 2},
}


def test_entries_are_paired_by_name_not_by_place() -> None:
    changes = {change.name: change for change in compare(BASE, HEAD)}
    assert changes["rows[folder tokens=576]/ms"].ratio == 0.5
    assert changes["rows[pool tokens=576]/ms"].ratio == 1
    assert changes["rows[folder tokens=576]/cpu"].base.differs_from(changes["rows[folder tokens=576]/cpu"].head)
    assert not any("new" in name for name in changes)
    lines = render(list(changes.values()), 0.02)[2:]
    assert lines == [
        "| rows[folder tokens=576]/ms | 10 | 5 | 0.500 |  |",
        "| rows[folder tokens=576]/cpu | 1 | 0.5 | 0.500 | yes |",
        "| rows[pool tokens=576]/cpu | 1 | 1.05 | 1.050 | no |",
    ]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in (("base", BASE), ("head", HEAD), ("other", {"x": 1})):
        (tmp_path / name).write_text(json.dumps(content))
    main([str(tmp_path / "base"), str(tmp_path / "head"), "--threshold", "0.1"])
    assert "7 figures in both, 2 changed by more than 10%" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([str(tmp_path / "base"), str(tmp_path / "other")])
    assert "no number in common" in capsys.readouterr().err


def test_start_ups_take_turns_and_the_first_does_not_count() -> None:
    order: list[str] = []

    def server(name: str, seconds: float) -> tuple[float, float]:
        order.append(name)
        return (100.0 if len(order) <= 2 else seconds), 2 * seconds

    found = measure(lambda: server("ours", 3), lambda: server("plain", 2), 3)
    assert order == ["ours", "plain", "plain", "ours", "ours", "plain", "plain", "ours"]
    assert (found["wall"].value, found["cpu"].value, found["wall"].pairs) == (1.5, 1.5, 3)
