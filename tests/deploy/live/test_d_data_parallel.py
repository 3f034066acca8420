"""Two engines behind one address."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.deploy.live.clients import Load
from tests.deploy.live.processes import server


@pytest.fixture
def two_engines(tiny_llava: Path, tmp_path: Path) -> Iterator[str]:
    process, url = server(tiny_llava, tmp_path, "--data-parallel-size", "2")
    process.start()
    try:
        process.wait_until_ready()
        yield url
    finally:
        process.stop()


def test_both_engines_answer_with_reduction_and_withdrawal(two_engines: str) -> None:
    with Load(two_engines, clients=4) as load:
        load.wait_for(24)
    assert load.ended == {"right": load.ended.total()}
    page = httpx.get(f"{two_engines}/metrics").text
    done = re.findall(r'^vllm:request_success_total\{engine="(\d)",finished_reason="length".*\} (\S+)$', page, re.M)
    print("data parallel:", done)
    assert len(done) == 2 and all(float(count) > 0 for _, count in done)
    assert sum(float(count) for _, count in done) == load.ended.total()
    capacity = re.findall(r'^foldserve_resident_capacity_sequences\{engine="(\d)"', page, re.MULTILINE)
    assert sorted(capacity) == ["0", "1"]
