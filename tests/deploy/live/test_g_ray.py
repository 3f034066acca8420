"""`foldserve.server.api.batch.ray` on a cluster of this machine: an actor is killed, then the job, which goes on."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow.parquet as pq

from tests.api.live import chat
from tests.deploy.live import ray_job
from tests.images import data_uri, photo

CHECKPOINT = Path("server/quality/demo/checkpoint").resolve()
PATIENCE_S = 600
ROWS = 200


def write_requests(path: Path) -> None:
    import pyarrow as pa

    picture = {"type": "image_url", "image_url": {"url": data_uri(photo(1))}}
    envelope = {"method": "POST", "url": "/v1/chat/completions"}
    rows = []
    for i in range(ROWS):
        ratio = 1.5 if i % 10 == 7 else 0.5
        body = chat(f"what? {i}", picture, reduction_ratio=ratio, temperature=0, max_tokens=100)
        rows.append({"custom_id": f"r-{i}", "line": json.dumps({"custom_id": f"r-{i}", "body": body} | envelope)})
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=10)


def workers(job: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Actors whose engines run."""
    return [
        p for p in psutil.Process(job.pid).children(recursive=True) if "AnsweringActor" in _title(p) and _engines(p)
    ]


def _engines(worker: psutil.Process) -> list[psutil.Process]:
    try:
        return [child for child in worker.children() if "EngineCore" in _title(child)]
    except psutil.Error:
        return []


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def wait(job: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert job.poll() is None, "the job ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_each_row_is_answered_once(tmp_path: Path) -> None:
    requests, output, checkpoints = tmp_path / "in.parquet", tmp_path / "out", tmp_path / "checkpoints"
    write_requests(requests)
    checkpoints.mkdir()
    command = [sys.executable, ray_job.__file__, *map(str, (requests, output, checkpoints, CHECKPOINT))]
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait(job, lambda: len(workers(job)) == 2 and _written(output) >= 1)
            killed = workers(job)[0]
            engines = _engines(killed)
            killed.kill()
            assert not psutil.wait_procs(engines, 60)[1], "the engine outlived its actor"
            before = _written(output)
            wait(job, lambda: _written(output) > before)
        finally:
            _end(job)
        assert 0 < _answered(checkpoints) < ROWS
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True, timeout=PATIENCE_S)
    results = [row for file in output.glob("*.parquet") for row in pq.read_table(file).to_pylist()]
    assert sorted(row["custom_id"] for row in results) == sorted(f"r-{i}" for i in range(ROWS))
    for row in results:
        result = json.loads(row["result"])
        assert result["custom_id"] == row["custom_id"]
        is_wrong = int(row["custom_id"].removeprefix("r-")) % 10 == 7
        assert result["response"]["status_code"] == (400 if is_wrong else 200), result
        if not is_wrong:
            vision = result["response"]["body"]["usage"]["vision_tokens"]
            assert vision["kept"] * 2 == vision["encoded"]


def _end(job: subprocess.Popen[bytes]) -> None:
    """Kills the job and Ray's processes."""
    if job.poll() is None:
        for process in (psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                process.kill()
    job.wait()


def _written(output: Path) -> int:
    return len(list(output.glob("*.parquet")))


def _answered(checkpoints: Path) -> int:
    """Rows that a job will not answer again; results of a killed one may be cut off, and the next removes those."""
    files = [file for file in checkpoints.rglob("*.parquet") if ".pending" not in file.name]
    return sum(pq.read_metadata(file).num_rows for file in files)
