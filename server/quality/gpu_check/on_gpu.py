"""Stages that need a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foldserve.server.quality.gpu_check.common import TRUE_FP32, StagePassed, ask_ours, engine, fp32_arguments
from foldserve.server.quality.gpu_check.comparison import compare, require, require_alike
from foldserve.server.quality.gpu_check.correctness import FP32
from foldserve.server.quality.gpu_check.job_runner import JobRunner, StageFailed
from foldserve.server.quality.gpu_check.jobs import (
    AnswerJob,
    AnswerResult,
    Case,
    KernelsJob,
    KernelsResult,
    MachineJob,
    MachineResult,
)
from foldserve.server.quality.gpu_check.references import REFERENCES, References

_MOST_SILU_ERROR = 1e-2
_REQUESTS = 40
_FOLLOWED, _MARGIN = 0.8, 0.3
"""Limits for fp16 against fp16. Measured for fp16 against fp32: 0.9 and 0.04, see docs/guides/gpu-check.md."""


def check_machine(job_runner: JobRunner) -> StagePassed:
    seen = job_runner.run("machine", "machine", MachineJob(), MachineResult)
    if not seen.silu_error <= _MOST_SILU_ERROR:
        raise StageFailed(
            f"vLLM's compiled silu_and_mul is off by {seen.silu_error:.2g}: its build is not for this GPU"
        )
    ceilings = f"bf16 products {seen.gemm_tflops:.0f} TFLOP/s, copies {seen.copy_gb_per_s:.0f} GB/s"
    return StagePassed(f"{seen.device} ({seen.capability}): {ceilings}; compiled kernels work", seen.model_dump())


def check_graphs(job_runner: JobRunner) -> StagePassed:
    layer = References.load().withdraw_layer
    found: dict[str, Any] = {}
    for name, k in (("fp32", None), (f"fp32, K={layer}", layer)):
        cases, eager, compiled = _eager_and_compiled(job_runner, name, k, fp32_arguments(job_runner), TRUE_FP32)
        comparison = compare(cases, eager.rounds[0], compiled.rounds[0], FP32)
        require(comparison, FP32, name)
        found[name] = {"steps": compiled.steps, **comparison.details}
    name = f"fp16, K={layer}"
    _, eager, compiled = _eager_and_compiled(job_runner, name, layer, {"dtype": "float16"}, {})
    followed, margin = require_alike(eager.rounds[0], compiled.rounds[0], followed=_FOLLOWED, margin=_MARGIN, what=name)
    found[name] = {"steps": compiled.steps, "followed": followed, "margin": margin}
    replayed = sum(_replayed(each["steps"]) for each in found.values())
    largest = max(max(each.get("errors", {"": 0.0}).values()) for each in found.values())
    line = (
        f"{_REQUESTS} requests in 3 engines, {replayed} steps replayed: margins within {largest:.1g} of eager in fp32"
    )
    return StagePassed(line, found)


def _eager_and_compiled(
    job_runner: JobRunner, name: str, layer: int | None, arguments: Mapping[str, Any], env: Mapping[str, str]
) -> tuple[tuple[Case, ...], AnswerResult, AnswerResult]:
    """Answers to the same requests without and with CUDA graphs; raises Failed if no step replayed a graph."""
    ask, file = _ask(job_runner, layer, dict(arguments)), "graphs-" + name.replace(", K=", "-k")
    slow = {"engine": ask.engine.model_copy(update={"arguments": ask.engine.arguments | {"enforce_eager": True}})}
    eager = ask_ours(job_runner, f"{file}-eager", ask.model_copy(update=slow), **env)
    compiled = ask_ours(job_runner, file, ask, **env)
    if not _replayed(compiled.steps) or _replayed(eager.steps):
        raise StageFailed(
            f"{name}: steps by graph mode {compiled.steps}, without graphs {eager.steps}: no graph was tried"
        )
    return ask.cases, eager, compiled


def _ask(job_runner: JobRunner, layer: int | None, arguments: dict[str, Any]) -> AnswerJob:
    """Requests for an engine with CUDA graphs whose answers end one by one, so that decode steps have all sizes."""
    known = References.load()
    takes = [case for case in known.cases if layer is not None or not _works_in_decoder(case)]
    cases = tuple(
        takes[i % len(takes)].model_copy(update={"name": f"{takes[i % len(takes)].name}, request {i}", "tokens": 4 + i})
        for i in range(_REQUESTS)
    )
    room = {"enforce_eager": False, "max_num_seqs": _REQUESTS, "max_num_batched_tokens": 1024}
    return AnswerJob(engine=engine(job_runner, layer, **room, **arguments), cases=cases, references=REFERENCES)


def _works_in_decoder(case: Case) -> bool:
    words = ("withdraw", "fastv", "illava_decoder")
    return any(word in str(reduction) for reduction in case.reductions for word in words)


def _replayed(steps: Mapping[str, int]) -> int:
    return sum(count for mode, count in steps.items() if "NONE" not in mode)


def check_sync(job_runner: JobRunner) -> StagePassed:
    """In the job, a wait for the GPU or a kernel compiled after start-up is an error."""
    ask = _ask(job_runner, References.load().withdraw_layer, {"jit_monitor_mode": "error"})
    found = ask_ours(job_runner, "sync", ask.model_copy(update={"rounds": 2}), VLLM_GPU_SYNC_CHECK="error")
    line = f"{_REQUESTS} requests twice on runner {found.runner}: no step waits for the GPU or compiles a kernel"
    return StagePassed(line, {"runner": found.runner, "steps": found.steps})


def check_kernels(job_runner: JobRunner) -> StagePassed:
    seen = job_runner.run("kernels", "kernels", KernelsJob(), KernelsResult, CUBLAS_WORKSPACE_CONFIG=":4096:8")
    if seen.failures:
        name, error = next(iter(seen.failures.items()))
        raise StageFailed(f"{len(seen.failures)} of {seen.checks} checks, such as {name}: {error}")
    if not seen.catches_a_wrong_kernel:
        raise StageFailed("a kernel that did not run was taken for right")
    return StagePassed(f"{seen.checks} checks of Triton kernels against torch", {"checks": seen.checks})
