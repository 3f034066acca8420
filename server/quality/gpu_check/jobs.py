"""Inputs and results of the jobs, which travel as JSON files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict


class _JobMessage(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Case(_JobMessage):
    """One request.

    Attributes:
        prompt: with an `<image>` for each image.
        images: indices in the file of references.
        reductions: one for each image, as in a request, or none at all.
        tokens: number to generate.
    """

    name: str
    prompt: str
    images: tuple[int, ...] = ()
    reductions: tuple[dict[str, Any], ...] = ()
    tokens: int


class Answer(_JobMessage):
    """A greedy answer.

    Attributes:
        prompt_tokens: with one placeholder for each kept vision token.
        margins: log-probability of the likeliest token minus that of the second.
    """

    prompt_tokens: int
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    margins: tuple[float, ...]


class EngineSpec(_JobMessage):
    """An engine to start in the job's process.

    Attributes:
        foldserve: False for plain vLLM.
        withdraw_layer: K, or None.
        serves: whether to use the scheduler of `foldserve serve` instead of that of `vllm.LLM`.
        arguments: fields of vLLM's `EngineArgs`.
        settings: foldserve's own, beside `withdraw_layer`, as in vLLM's additional config.
    """

    model: Path
    foldserve: bool = True
    withdraw_layer: int | None = None
    serves: bool = True
    arguments: dict[str, Any] = {}
    settings: dict[str, Any] = {}


class AnswerJob(_JobMessage):
    """Job `answer`: sends all cases at once, `rounds` times to one engine.

    Every second round is in reverse order: a small prefix cache still has the last cases of the round before.
    """

    engine: EngineSpec
    cases: tuple[Case, ...]
    references: Path
    rounds: int = 1


class AnswerResult(_JobMessage):
    """Result of the job `answer`.

    Attributes:
        runner: v1 or v2.
        rounds: for each round, an answer to each case.
        steps: number of steps by CUDA graph mode.
        cached_tokens: prompt tokens from the prefix cache in the last round.
        held_blocks: KV blocks still in use at the end.
        facts: `engine_facts`, unless the engine is plain vLLM.
    """

    model_class: str
    runner: str
    rounds: tuple[tuple[Answer, ...], ...]
    steps: dict[str, int]
    preemptions: int
    cached_tokens: int
    held_blocks: int
    facts: dict[str, Any] = {}


class BurstJob(_JobMessage):
    """Job `burst`: first as many unreduced images as start-up profiled, then `images` reduced ones at once."""

    engine: EngineSpec
    images: int
    reduction: dict[str, Any]


class BurstResult(_JobMessage):
    """Result of the job `burst`.

    Attributes:
        profiled: images at once that start-up profiled.
        scheduled: most images in one scheduling step of the burst.
        encoded: most images in one run of the tower.
        answered: number of requests that got their token.
        plain_bytes: peak device memory with unreduced images, above that between steps; None on a CPU.
        burst_bytes: the same in the burst.
    """

    profiled: int
    scheduled: int
    encoded: int
    answered: int
    plain_bytes: int | None = None
    burst_bytes: int | None = None


class TowerJob(_JobMessage):
    """Job `tower`: batches of images with the engine's graphs of the tower and without, then requests both ways.

    Attributes:
        reduction: of the requests; the engine's default.
        tokens: of an answer.
    """

    engine: EngineSpec
    reduction: dict[str, Any]
    requests: int
    tokens: int = 8


class TowerRow(_JobMessage):
    """One batch.

    Attributes:
        graph_ms, eager_ms: from pixels on the device to embeddings; medians.
        difference: the largest one of two embeddings, relative to the largest embedding.
    """

    images: int
    graph_ms: float
    eager_ms: float
    difference: float


class TowerResult(_JobMessage):
    """Result of the job `tower`.

    Attributes:
        replays, eager_replays: graphs that were replayed for the requests, with graphs and without.
        alike: number of requests whose answers have equal ids.
    """

    rows: tuple[TowerRow, ...]
    replays: int
    eager_replays: int
    requests: int
    alike: int


class LoadJob(_JobMessage):
    """Job `load`: for each reduction, `rounds` times `requests` at once, then `singles` one after the other.

    Attributes:
        words: text tokens of a prompt.
        tokens: tokens of an answer.
    """

    engine: EngineSpec
    reductions: tuple[dict[str, Any], ...]
    image_px: int
    requests: int = 64
    tokens: int = 64
    rounds: int = 3
    singles: int = 12
    words: int = 30


class LoadRow(_JobMessage):
    """Medians at one reduction.

    Attributes:
        requests_per_s: of requests sent at once.
        ttft_ms, itl_ms: of one request alone; TTFT includes image processing.
        sequences: number of such requests that the KV cache holds.
    """

    requests_per_s: float
    ttft_ms: float
    itl_ms: float
    prompt_tokens: int
    sequences: int


class LoadResult(_JobMessage):
    """Result of the job `load`.

    Attributes:
        rows: one for each reduction.
        steps: number of steps by CUDA graph mode.
        peak_bytes: peak device memory; None on a CPU.
    """

    rows: tuple[LoadRow, ...]
    runner: str
    steps: dict[str, int]
    peak_bytes: int | None = None


class MachineJob(_JobMessage):
    """Job `machine`: whether vLLM's compiled kernels work, and the device's peak throughput."""


class MachineResult(_JobMessage):
    """Result of the job `machine`; `silu_error` is the relative error of vLLM's compiled `silu_and_mul` in bf16."""

    device: str
    capability: str
    torch: str
    gemm_tflops: float
    copy_gb_per_s: float
    silu_error: float


class KernelsJob(_JobMessage):
    """Job `kernels`: each Triton kernel against its torch reference."""


class KernelsResult(_JobMessage):
    """Result of the job `kernels`.

    Attributes:
        failures: check -> error.
        catches_a_wrong_kernel: whether the check fails if a kernel does not run.
    """

    checks: int
    failures: dict[str, str]
    catches_a_wrong_kernel: bool
