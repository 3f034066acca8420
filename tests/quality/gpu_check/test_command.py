"""The command around the stages: processes that fail in every way, budgets, files, and machines without a GPU."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from foldserve.server import cli
from foldserve.server.quality.gpu_check import command
from foldserve.server.quality.gpu_check import job_runner as job_runner_module
from foldserve.server.quality.gpu_check.common import StagePassed
from foldserve.server.quality.gpu_check.job_runner import ProcessJobRunner, StageFailed
from foldserve.server.quality.gpu_check.jobs import Case, KernelsJob, KernelsResult
from foldserve.server.quality.gpu_check.options import STAGES, GpuCheckOptions
from foldserve.server.quality.gpu_check.page import charts
from foldserve.server.quality.gpu_check.result import CheckResults
from foldserve.server.quality.gpu_check.stages import ALL
from tests.loadtest.readable import check

CUDA = GpuCheckOptions()
KERNELS = KernelsResult(checks=1, failures={}, catches_a_wrong_kernel=True)


def made_up(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> ProcessJobRunner:
    """A job runner whose jobs run `code`."""
    (folder / "made_up_jobs.py").write_text(code)
    monkeypatch.setattr(job_runner_module, "JOBS", "made_up_jobs")
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    job_runner = ProcessJobRunner(CUDA, folder)
    job_runner.start_stage(60)
    return job_runner


def run(job_runner: ProcessJobRunner) -> KernelsResult:
    return job_runner.run("kernels", "kernels", KernelsJob(), KernelsResult)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os; os.abort()", r"kernels was ended by SIGABRT: it said nothing \(.*kernels\.log\)"),
        ("print('no memory'); raise SystemExit(4)", "kernels ended with status 4: no memory"),
        (
            "import sys; print('gpu-check job failed: ValueError: x', file=sys.stderr); print('bye'); sys.exit(1)",
            "kernels ended with status 1: ValueError: x ",
        ),
        ("", "kernels ended with status 0: it said nothing"),
        ("import sys; open(sys.argv[3], 'w').write('{}')", "kernels gave another answer than expected"),
    ],
    ids=["crash", "status", "marked", "nothing", "garbage"],
)
def test_what_a_job_ends_with_is_one_line(
    code: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StageFailed, match=message):
        run(made_up(tmp_path, monkeypatch, code))


def test_a_job_that_hangs_is_killed_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""
    job_runner = made_up(tmp_path, monkeypatch, code)
    job_runner.start_stage(6)  # Python has to start meanwhile, on a machine that may be busy
    with pytest.raises(StageFailed, match="kernels was not done within 6 s"):
        run(job_runner)
    child = int((tmp_path / "kernels.log").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split(")")[1][:3]:
        assert time.monotonic() < deadline, "the child lives"
        time.sleep(0.05)


def test_what_a_job_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"""
import os, sys
assert sys.argv[1] == "kernels" and open(sys.argv[2]).read() == "{{}}", sys.argv
assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0" and os.environ["OURS"] == "1"
assert os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "0"
open(sys.argv[3], "w").write('''{KERNELS.model_dump_json()}''')
"""
    job_runner = made_up(tmp_path, monkeypatch, code)
    job_runner.options = GpuCheckOptions(model_runner="v1")
    assert job_runner.run("kernels", "kernels", KernelsJob(), KernelsResult, OURS="1") == KERNELS


def test_the_real_jobs_say_what_they_fail_of(tmp_path: Path) -> None:
    """Here for want of a GPU."""
    job_runner = ProcessJobRunner(CUDA, tmp_path)
    job_runner.start_stage(120)
    seen = run(job_runner)
    assert len(seen.failures) == seen.checks > 50
    with pytest.raises(StageFailed, match=r"x ended with status 1: ModuleNotFoundError: No module named .*no_such_job"):
        job_runner.run("x", "no_such_job", KernelsJob(), KernelsResult)


Found = Callable[..., CheckResults]


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Found:
    """Runs the command with made-up stages, which name what they do."""

    def passes(job_runner: object) -> StagePassed:
        return StagePassed("all well")

    def compares(job_runner: object) -> StagePassed:
        return StagePassed("all well", {"errors": {"a case": 0.001, "another": 0.002}})

    def fails(job_runner: object) -> StagePassed:
        raise StageFailed("not well")

    def breaks(job_runner: object) -> StagePassed:
        raise ZeroDivisionError("of the stage itself")

    def loads(job_runner: object) -> StagePassed:
        row: dict[str, object] = {
            "ratio": 0,
            "requests_per_s": 9,
            "ttft_ms": 1,
            "itl_ms": 1,
            "prompt_tokens": 9,
            "sequences": 7,
        }
        rows = [
            row | {"engine": engine, "runner": "v2", "peak_bytes": 2**31} for engine in ("plain vLLM", "ours", "ours")
        ]
        return StagePassed("all well", {"requests": 64, "tokens": 32, "rows": rows})

    def encodes(job_runner: object) -> StagePassed:
        row = {"images": 4, "eager_ms": 3.3, "graph_ms": 0.8, "difference": 1e-6}
        return StagePassed("all well", {"demo": {"rows": [row]}})

    def found(**options: object) -> CheckResults:
        each = dict.fromkeys(STAGES, passes) | {
            "ratio-0": fails,
            "reference": compares,
            "tower": encodes,
            "burst": breaks,
            "load": loads,
        }
        stages = {name: replace(stage, run=each[name]) for name, stage in ALL.items()}
        monkeypatch.setattr(command, "ALL", stages)
        made = GpuCheckOptions(output=tmp_path / "out", **options)  # type: ignore[arg-type]
        return command.run(made, {"GPU 0": "one | two"}, {})

    return found


def test_one_line_a_stage_and_all_go_on(found: Found, capsys: pytest.CaptureFixture[str]) -> None:
    results = found()
    printed, said = capsys.readouterr()
    lines = [re.sub(" +", " ", line) for line in printed.splitlines()]
    assert lines[1:3] == ["PASS smoke 0 s all well", "FAIL ratio-0 0 s not well"]
    assert "FAIL burst 0 s ZeroDivisionError: of the stage itself" in lines and "Traceback" in said
    assert len(lines) == len(STAGES) and results.failed == 2
    assert results.verdict() == "8 passed, 2 failed, 0 skipped"


def test_files(found: Found, tmp_path: Path) -> None:
    results = found(stages=("reference", "ratio-0", "tower", "load"))
    told = json.loads((tmp_path / "out" / "gpu-check.json").read_text())
    assert CheckResults.model_validate(told) == results
    assert [stage["stage"] for stage in told["stages"]] == ["ratio-0", "reference", "tower", "load"]
    page = (tmp_path / "out" / "gpu-check.md").read_text()
    assert page.startswith("# GPU check: 3 passed, 1 failed, 0 skipped\n")
    assert "| GPU 0 | one \\| two |" in page and "| ratio-0 | FAIL | 0 |" in page
    assert "| plain vLLM, v2 | 0 | 9 | 9.00 | 1.0 | 1.00 | 7 | 2.0 |" in page and "64 requests of 32 tokens" in page
    assert "| demo | 4 | 3.30 | 0.80 | 1e-06 |" in page
    plots = {plot.name: plot.read_text() for plot in (tmp_path / "out").glob("*.svg")}
    assert set(plots) == {"errors-reference.svg", "load.svg", "ttft.svg", "sequences.svg"}
    assert all(f"]({name})" in page for name in plots)
    assert "another" in plots["errors-reference.svg"] and "plain vLLM" in plots["load.svg"]
    for chart in charts({"": results}) + charts({"one": results, "other": results}):
        check(chart)
    html = (tmp_path / "out" / "index.html").read_text()
    assert "3 passed, 1 failed, 0 skipped. ratio-0 failed" in html
    assert "<dt>GPU 0</dt><dd>one | two</dd>" in html and html.index("ratio-0") < html.index("<svg")


def test_a_budget_that_is_used_up(found: Found) -> None:
    results = found(budget=5)
    assert {result.status for result in results.stages} == {"SKIP"}
    assert results.stages[0].line == "--budget 5 is used up"


def test_what_needs_a_gpu_is_skipped_on_a_cpu(found: Found) -> None:
    results = found(device="cpu")
    skipped = {result.stage: result.line for result in results.stages if result.status == "SKIP"}
    assert set(skipped) == {"machine", "graphs", "tower", "sync", "kernels", "load"} and all(skipped.values())


def test_load_on_a_cpu_takes_a_small_model(found: Found, tiny_llava: Path) -> None:
    (result,) = found(device="cpu", model=tiny_llava, stages=("load",)).stages
    assert result.status == "PASS"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--stages", "smoke,graph"], "--stages are machine, smoke"),
        (["--device", "cpu", "--model-runner", "v2"], "needs Triton"),
        (["--model", "/nowhere"], "no config.json"),
        (["--budget", "0"], "--budget must be more than 0"),
        (["--gpu-memory-utilization", "90"], "between 0 and 1"),
        (["--dtype", "float16"], "unrecognized arguments"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["gpu-check", *argv])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_without_a_gpu_it_says_what_is_missing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["gpu-check", "--output", str(tmp_path / "out")])
    assert ended.value.code == 3
    printed, said = capfd.readouterr()
    assert "no GPU to check here:" in said and "foldserve gpu-check" not in printed
    assert "vLLM for CUDA: this one is for CPUs. pip install vllm==" in said and "NVIDIA driver" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("driver", "message"),
    [(None, "there is no NVIDIA driver"), ("580.65.06", "driver 580.65.06 shows no GPU")],
    ids=["no driver", "no GPU"],
)
def test_a_cuda_build_without_a_gpu(
    driver: str | None, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from foldserve.server.api.doctor.machine import Machine

    found = Machine("none", "13.0", driver, (), False, 8, (), 1, 1, None)
    monkeypatch.setattr(Machine, "read", lambda: found)
    with pytest.raises(SystemExit) as ended:
        cli.main(["gpu-check"])
    assert ended.value.code == 3
    assert message in capsys.readouterr().err


def test_prompts_have_a_mark_for_each_image() -> None:
    from foldserve.server.quality.gpu_check.references import References

    cases: tuple[Case, ...] = References.load().cases
    assert all(case.prompt.count("<image>") == len(case.images) == len(case.reductions) for case in cases)
