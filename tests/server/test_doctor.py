"""`foldserve doctor`: facts about the demo model, the same refusals as `serve`, and the table for a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from foldserve.server.api.doctor import machine
from foldserve.server.api.doctor.examine import examine, machine_problems, memory_problems
from foldserve.server.api.doctor.machine import Gpu, Machine
from foldserve.server.api.doctor.report import DoctorReport, Problem
from foldserve.server.api.doctor.table import table
from foldserve.server.api.doctor.versions import Versions
from foldserve.server.api.sizes import size
from foldserve.server.commands import doctor
from foldserve.server.engine.facts import kv
from foldserve.server.engine.facts.attention import attention_backend
from foldserve.server.engine.facts.choices import EngineFacts
from foldserve.server.engine.facts.kv import KvFacts, KvGroup
from foldserve.server.engine.facts.model import ModelFacts
from foldserve.server.engine.plugin import require_vllm
from foldserve.server.quality.demo.checkpoint import CHECKPOINT
from foldserve.server.settings import Environment, Settings

GIB = 2**30
ENVIRONMENT = Environment(Path("/cache"), None, False, "g++")
VERSIONS = Versions("0.1.0", "0.32.0", "0.32.0", "2.13.0", "5.19.0", "3.9.0", "3.12.3")
H200 = Gpu("NVIDIA H200", "9.0", 140 * GIB, 139 * GIB)
MACHINE = Machine("cuda", "13.0", "580.65.06", (H200, H200), True, 32, ("AVX-512", "AVX2"), 200 * GIB, 256 * GIB, GIB)
REPORT = DoctorReport(
    problems=(),
    versions=VERSIONS,
    machine=MACHINE,
    model=ModelFacts(
        name="llava-hf/llava-1.5-7b-hf",
        architecture="LlavaForConditionalGeneration",
        decoder="LlamaForCausalLM",
        layers=32,
        family="llava",
        unit="image",
        image_tokens=576,
        images_per_call=14,
        encoder_cache_rows=8192,
        encoder_row_bytes=2 * (4096 + 3),
        keeps_positions=True,
        withdraw_layer=16,
        can_withdraw=True,
    ),
    methods=("folder", "tome"),
    decoder_methods=("withdraw", "fastv"),
    engine=EngineFacts(
        runner="v2",
        runner_reason="vLLM's choice",
        worker="foldserve.server.engine.worker_cuda.FoldWorker",
        scheduler="foldserve.server.engine.withdrawal.scheduler.WithdrawingAsyncScheduler",
        attention="FLASH_ATTN",
        tower_attention="FLASH_ATTN",
        graphs="FULL_AND_PIECEWISE",
        compilation="VLLM_COMPILE",
        dtype="float16",
        kv_dtype="float16",
        max_model_len=4096,
        prefix_caching=True,
        chunked_prefill=True,
        async_scheduling=True,
        max_num_seqs=1024,
        max_num_batched_tokens=8192,
    ),
    kv=KvFacts(
        token_bytes=524_288,
        text_tokens=64,
        sequence_tokens=640,
        sequence_bytes=640 * 524_288,
        withdrawn_bytes=352 * 524_288,
        block_tokens=16,
        groups=(KvGroup("shallow", 16), KvGroup("deep", 16)),
        pool_bytes=None,
        sequences=None,
        withdrawn_sequences=None,
    ),
)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Variables as they were: what a server sets for its processes stays out of other tests."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def look(*argv: str, settings: Settings = Settings()) -> DoctorReport:  # noqa: B008
    return examine(["--port", "0", *argv], settings, ENVIRONMENT, CHECKPOINT, "auto")


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    """Status and output of the command, in this process."""
    from foldserve.server import cli

    with pytest.raises(SystemExit) as exit_:
        cli.main(["doctor", "--port", "0", *argv])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code, capsys.readouterr().out


@pytest.fixture(scope="module")
def written() -> dict[str, Any]:
    """What a process of its own prints for the demo model with K = 8."""
    command = [sys.executable, "-m", "foldserve.server.cli", "doctor", "--port", "0", "--withdraw-layer", "8", "--json"]
    env = {name: value for name, value in os.environ.items() if name != "VLLM_LOGGING_LEVEL"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600, env=env)
    assert done.stderr == ""
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_the_demo_model_over_the_command_line(written: dict[str, Any]) -> None:
    assert (written["starts"], written["problems"]) == (True, [])
    require_vllm(written["versions"]["vllm"])
    assert (written["machine"]["platform"], written["machine"]["gpus"]) == ("cpu", [])
    assert written["machine"]["cpu_count"] == len(os.sched_getaffinity(0))
    model, engine = written["model"], written["engine"]
    assert (model["family"], model["image_tokens"], model["withdraw_layer"], model["layers"]) == ("llava", 144, 8, 12)
    assert model["keeps_positions"]
    assert model["images_per_call"] == engine["max_num_batched_tokens"] // model["image_tokens"] == 14
    assert engine["runner"] == "v1"
    assert engine["worker"] == "foldserve.server.engine.worker_cpu.FoldWorker"
    assert engine["scheduler"] == "foldserve.server.engine.withdrawal.scheduler.WithdrawingScheduler"
    assert (engine["attention"], engine["tower_attention"]) == ("CPU_ATTN", "TORCH_SDPA")
    assert (engine["graphs"], engine["compilation"], engine["dtype"]) == ("NONE", "NONE", "float32")
    assert (engine["prefix_caching"], engine["chunked_prefill"], engine["async_scheduling"]) == (True, True, False)
    assert written["decoder_methods"] == ["withdraw", "illava_decoder", "fastv"]
    assert "folder" in written["methods"] and "withdraw" not in written["methods"]


def test_the_example_in_the_documentation_has_the_methods_of_today(written: dict[str, Any]) -> None:
    pages = (Path(__file__).resolve().parents[2] / "docs" / "guides" / "operations.md").read_text()
    shown = re.search(r"^  methods +(.*?)\n  positions", pages, re.MULTILINE | re.DOTALL)
    assert shown is not None and re.split(r",\s+", shown[1]) == written["methods"]


def test_memory_of_the_demo_model(written: dict[str, Any]) -> None:
    text = json.loads((CHECKPOINT / "config.json").read_text())["text_config"]
    head = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    layer_bytes = 2 * text["num_key_value_heads"] * head * 4  # keys and values in float32
    kv = written["kv"]
    assert kv["token_bytes"] == 12 * layer_bytes
    assert kv["sequence_bytes"] == (144 + 64) * 12 * layer_bytes
    assert kv["withdrawn_bytes"] == (144 * 8 + 64 * 12) * layer_bytes
    shallow, deep = {"kind": "shallow", "layers": 4}, {"kind": "deep", "layers": 4}
    assert kv["groups"] == [shallow, shallow, deep]
    blocks = kv["pool_bytes"] // (4 * 128 * layer_bytes) - 1
    assert kv["block_tokens"] == 128
    assert kv["sequences"] == blocks // 6  # two blocks for 208 tokens, in three groups
    assert kv["withdrawn_sequences"] == blocks // 5  # one for the 64 that deep layers keep


def test_the_table_of_the_demo_model(capsys: pytest.CaptureFixture[str]) -> None:
    status, out = run(capsys, "--kv-cache-memory-bytes", str(64 << 20))
    assert status == 0
    assert out.startswith("foldserve serve would start here\n\nmodel\n")
    assert "withdrawal        off; --withdraw-layer 1 to 11 adds withdraw, illava_decoder, fastv\n" in out
    assert "groups            1 of 12 layers; blocks of 128 tokens\n" in out
    assert "pool              64 MiB: 16 such sequences\n" in out  # of 34 blocks of 1.88 MiB, one kept back
    assert "model runner      v1 (vLLM's choice: v2 needs Triton, which does not run here)\n" in out
    assert max(map(len, out.splitlines())) <= 110


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-cc.cudagraph_mm_encoder=true"], "cudagraph_mm_encoder in --compilation-config does not go with foldserve"),
        (["--enable-log-requests"], "not taken: --enable-log-requests: what requests say is never logged"),
        (["--no-such-option"], "unrecognized arguments: --no-such-option"),
        (["--withdraw-layer", "12"], "--withdraw-layer must be an integer from 1 to 11 for this model, got 12"),
        (["--withdraw-layer", "4", "--enable-lora"], "--withdraw-layer does not go with --enable-lora"),
        (["--low-detail-ratio", "2"], "the low-detail ratio must lie in [0, 1), not 2.0"),
        (["--calibration", "x.json"], "--calibration is what --withdraw-layer auto reads: give both or none"),
        (["/no/such/model"], "there is no directory /no/such/model"),
        (["--kv-cache-memory-bytes", str(4 << 20)], "To serve at least one request with the model's max seq len"),
        (["--kv-cache-memory-bytes", str(1 << 50)], "--kv-cache-memory-bytes asks for 1048576.0 GiB, memory has"),
    ],
    ids=lambda value: value[0].strip("-") if isinstance(value, list) else "",
)
def test_what_serve_refuses_is_a_problem(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = run(capsys, *argv)
    said = " ".join(out.split())
    assert status == 1
    assert said.startswith("foldserve serve would not start here: 1 problem problem ")
    assert message in said


def test_a_port_in_use_hides_no_facts() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        report = look("--host", "127.0.0.1", "--port", port)
    assert [problem.text for problem in report.problems] == [
        f"can't listen on 127.0.0.1:{port}: Address already in use"
    ]
    assert report.kv is not None and not report.can_start


def test_blocks_are_of_a_size_that_the_attention_backend_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs, where vLLM asks the backend once the model is built."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms.interface import Platform

    config = EngineArgs(str(CHECKPOINT), dtype="float32", enforce_eager=True).create_engine_config()
    backend = attention_backend(config)
    assert backend is not None
    large = type("Large", (backend,), {"get_supported_kernel_block_sizes": staticmethod(lambda: [48])})
    monkeypatch.setattr(kv, "attention_backend", lambda config: large)
    monkeypatch.setattr(kv, "current_platform", Platform)
    before = config.cache_config.block_size
    facts = kv.kv_facts(config)
    assert facts is not None and facts.block_tokens == 48
    assert config.cache_config.block_size == before != 48
    assert not config.compilation_config.static_forward_context


def test_another_vllm_is_said_before_anything_of_it_is_imported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Versions, "read", lambda: replace(VERSIONS, vllm="0.31.0"))
    status, out = run(capsys)
    assert status == 1
    assert "  problem  foldserve needs vLLM 0.32.0, found 0.31.0: pip install vllm==0.32.0\n" in out
    assert "  vLLM              0.31.0\n" in out
    assert replace(VERSIONS, vllm=None).problem is not None


def test_a_later_vllm_that_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    later = replace(VERSIONS, vllm="0.99.0+cpu")
    assert later.problem is not None
    monkeypatch.setenv("FOLDSERVE_ALLOW_VLLM", "0.99.0")
    assert later.problem is None
    line = "vLLM              0.99.0+cpu, allowed by FOLDSERVE_ALLOW_VLLM; this release is for 0.32.0"
    assert f"\n  {line}\n" in table(replace(REPORT, versions=later))
    assert "\n  vLLM              0.32.0, the one that this release is for\n" in table(REPORT)


def test_a_table_with_gpus() -> None:
    shown = table(REPORT)
    assert max(map(len, shown.splitlines())) <= 110
    for line in (
        "withdrawal        from layer K = 16 of 32 on: withdraw, fastv",
        "a tower call      14 images of the largest size at most",
        "encoder cache     64 MiB: 8192 embeddings of 8.01 KiB",
        "a token           512 KiB",
        "a sequence        320 MiB, 640 tokens: one largest image and 64 of text",
        "  withdrawn       176 MiB, 55% of it: no layer from K on holds the image",
        "groups            1 of 16 shallow layers, 1 of 16 deep layers; blocks of 16 tokens",
        "pool              what start-up finds free",
        "model runner      v2 (vLLM's choice)",
        "graphs            FULL_AND_PIECEWISE, compilation VLLM_COMPILE",
        "driver            580.65.06",
        "GPU 1             NVIDIA H200, compute capability 9.0, 139 GiB of 140 GiB free",
        "torch             2.13.0 for CUDA 13.0",
    ):
        assert f"\n  {line}\n" in shown


def test_problems_come_first_and_those_that_stop_before_others() -> None:
    problems = (Problem("a warning: do this", stops=False), Problem("word " * 40 + "end"))
    shown = table(replace(REPORT, problems=problems)).splitlines()
    assert shown[0] == "foldserve serve would not start here: 1 problem, 1 warning"
    assert shown[1].startswith("  problem  word word")
    assert shown[2].startswith("           word")
    assert shown[4] == "  warning  a warning: do this"
    assert shown[5:7] == ["", "model"]


def test_a_model_that_is_not_reduced() -> None:
    assert REPORT.model is not None
    plain = replace(
        REPORT.model, family=None, image_tokens=None, images_per_call=None, encoder_cache_rows=None, withdraw_layer=None
    )
    shown = table(replace(REPORT, model=plain, kv=None))
    assert "reduction         none: foldserve does not reduce this architecture\n" in shown
    assert "a tower call" not in shown


@pytest.mark.parametrize(
    ("found_machine", "environment", "expected"),
    [
        (MACHINE, ENVIRONMENT, []),
        (
            replace(MACHINE, platform="none", driver=None, gpus=()),
            ENVIRONMENT,
            [(True, "this is a build for CUDA 13.0, but there is no NVIDIA driver: install one, start the container")],
        ),
        (
            replace(MACHINE, platform="none", gpus=()),
            ENVIRONMENT,
            [(True, "this is a build for CUDA 13.0, but driver 580.65.06 shows no GPU: look at nvidia-smi")],
        ),
        (
            replace(MACHINE, platform="none", driver=None, gpus=(), cuda_build=None),
            ENVIRONMENT,
            [(True, "vLLM finds no device that it can run on")],
        ),
        (replace(MACHINE, triton_runs=False), ENVIRONMENT, [(False, "Triton does not run here")]),
        (
            replace(MACHINE, triton_runs=False),
            replace(ENVIRONMENT, wants_triton=True),
            [(True, "Triton does not run here")],
        ),
        (replace(MACHINE, shm_free_bytes=64 << 20), ENVIRONMENT, [(False, "/dev/shm has 64 MiB left")]),
        (
            MACHINE,
            replace(ENVIRONMENT, vllm_plugins=("theirs",)),
            [(False, "VLLM_PLUGINS=theirs leaves foldserve out")],
        ),
        (MACHINE, replace(ENVIRONMENT, vllm_plugins=("foldserve", "foldserve_api")), []),
    ],
    ids=["all-well", "no-driver", "no-gpu", "no-device", "triton", "triton-wanted", "shm", "plugins", "plugins-ours"],
)
def test_problems_of_a_machine(
    found_machine: Machine, environment: Environment, expected: Sequence[tuple[bool, str]]
) -> None:
    found = list(machine_problems(found_machine, environment))
    assert len(found) == len(expected)
    for problem, (stops, text) in zip(found, expected, strict=True):
        assert problem.stops is stops
        assert problem.text.startswith(text)


def test_a_cuda_build_without_a_gpu_is_one_clear_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = replace(MACHINE, platform="none", driver=None, gpus=())
    monkeypatch.setattr(Machine, "read", lambda: nothing)
    status, out = run(capsys)
    assert (status, out.count("  problem  ")) == (1, 1)
    assert "this is a build for CUDA 13.0, but there is no NVIDIA driver" in out
    assert "platform          none that vLLM can run on\n" in out


class Nvml:
    """NVML of a machine with two GPUs, the second of which has no memory of its own."""

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):
        pass

    closed = 0

    def nvmlInit(self) -> None:
        pass

    def nvmlShutdown(self) -> None:
        self.closed += 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.65.06"

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index >= 2:
            raise self.NVMLError("Invalid Argument")
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return {"GPU-a": 0, "GPU-b": 1}[uuid]

    def nvmlDeviceGetName(self, handle: int) -> str:
        return ("H200", "GB10")[handle]

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:
        return ((9, 0), (12, 1))[handle]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        if handle == 1:
            raise self.NVMLError_NotSupported
        return SimpleNamespace(total=140 * GIB, free=139 * GIB)


@pytest.mark.parametrize(
    ("visible", "names"),
    [(None, ["H200", "GB10"]), ("1", ["GB10"]), ("GPU-b,GPU-a", ["GB10", "H200"]), ("", [])],
    ids=["all", "index", "uuid", "none"],
)
def test_gpus_that_are_visible(visible: str | None, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Nvml()
    monkeypatch.setattr(machine, "pynvml", nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = Machine.read()
    assert found.driver == "580.65.06"
    assert [gpu.name for gpu in found.gpus] == names
    known = {"H200": Gpu("H200", "9.0", 140 * GIB, 139 * GIB), "GB10": Gpu("GB10", "12.1", 0, 0)}
    assert all(gpu == known[gpu.name] for gpu in found.gpus)
    assert nvml.closed == 1


def test_a_visible_gpu_that_is_not_here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "pynvml", Nvml())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,7")
    status, out = run(capsys)
    assert status == 1
    assert "  problem  CUDA_VISIBLE_DEVICES=0,7 names GPUs that are not here: Invalid Argument\n" in out


@pytest.mark.parametrize(
    ("share", "ranks", "expected"),
    [
        (0.92, 1, []),
        (0.92, 2, []),
        (1.0, 2, ["GPU 0 has 139.0 GiB free", "GPU 1 has 139.0 GiB free"]),
        (0.92, 4, ["4 GPUs are asked for, 2 are here: lower --tensor-parallel-size"]),
    ],
)
def test_memory_of_gpus(share: float, ranks: int, expected: list[str]) -> None:
    config: Any = SimpleNamespace(
        cache_config=SimpleNamespace(gpu_memory_utilization=share, kv_cache_memory_bytes=None),
        parallel_config=SimpleNamespace(world_size=ranks, nnodes=1),
    )
    found = [problem.text for problem in memory_problems(config, MACHINE)]
    assert len(found) == len(expected)
    assert all(part in text for part, text in zip(expected, found, strict=True))


@pytest.mark.parametrize(
    ("bytes_", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (1023 << 10, "1023 KiB"),
        (3 << 40, "3 TiB"),
        (5 << 50, "5120 TiB"),
    ],
)
def test_sizes(bytes_: int, text: str) -> None:
    assert size(bytes_) == text


def test_help_names_the_options_of_serve(capsys: pytest.CaptureFixture[str]) -> None:
    from foldserve.server import cli

    cli.main(["doctor", "--help"])
    out = capsys.readouterr().out
    assert "foldserve doctor [MODEL] [options] [any option of vllm serve]" in out
    assert "--json" in out and "--withdraw-layer" in out and doctor.add.__module__ in sys.modules
