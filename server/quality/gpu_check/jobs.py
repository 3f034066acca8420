"""What the processes are asked and what they answer, as JSON files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Case(_Message):
    """One request.

    Attributes:
        prompt: with an `<image>` for each of the images.
        images: their numbers in the file of references.
        reductions: one for each image, as in a request; none are sent if there are none.
        tokens: to generate.
    """

    name: str
    prompt: str
    images: tuple[int, ...] = ()
    reductions: tuple[dict[str, Any], ...] = ()
    tokens: int


class Answer(_Message):
    """A greedy answer.

    Attributes:
        prompt_tokens: placeholders of the tokens that images keep among them.
        logprobs: of `ids`.
        margins: by how much the likeliest token leads over the next one, in log-probability.
    """

    prompt_tokens: int
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    margins: tuple[float, ...]


class Engine(_Message):
    """An engine to start in the process.

    Attributes:
        foldserve: False: vLLM's own classes.
        withdraw_layer: K, or None without withdrawal.
        serves: with the scheduler of `foldserve serve`, not that of `vllm.LLM`.
        arguments: fields of vLLM's `EngineArgs`.
    """

    model: Path
    foldserve: bool = True
    withdraw_layer: int | None = None
    serves: bool = True
    arguments: dict[str, Any] = {}


class Ask(_Message):
    """Job `answer`: the cases all at once, `rounds` times in one engine.

    Every second time in reverse order: a small prefix cache still has those that came last.
    """

    engine: Engine
    cases: tuple[Case, ...]
    references: Path
    rounds: int = 1


class Answers(_Message):
    """What the engine said and did.

    Attributes:
        model_class: with its module.
        runner: v1 or v2.
        rounds: an answer to each case in each round.
        steps: scheduling steps by the mode of CUDA graphs that they ran in.
        preemptions: in all rounds.
        cached_tokens: of prompts, found in the prefix cache in the last round.
        held_blocks: KV blocks that were not given back at the end.
        facts: `engine_facts` of an engine of foldserve.
    """

    model_class: str
    runner: str
    rounds: tuple[tuple[Answer, ...], ...]
    steps: dict[str, int]
    preemptions: int
    cached_tokens: int
    held_blocks: int
    facts: dict[str, Any] = {}


class Burst(_Message):
    """Job `burst`: so many images at once, all reduced, after as many as start-up profiled, unreduced."""

    engine: Engine
    images: int
    reduction: dict[str, Any]


class BurstSeen(_Message):
    """What the vision tower had to do.

    Attributes:
        profiled: images at once that start-up measured.
        scheduled: most images of one scheduling step in the burst.
        encoded: most images of one run of the tower in the burst.
        answered: requests that got their token.
        plain_bytes: most memory on the device above what is held between steps, unreduced; None on a CPU.
        burst_bytes: the same in the burst.
    """

    profiled: int
    scheduled: int
    encoded: int
    answered: int
    plain_bytes: int | None = None
    burst_bytes: int | None = None


class Load(_Message):
    """Job `load`: at each reduction `rounds` times `requests` at once, then `singles` one after the other.

    Attributes:
        words: text tokens of a prompt beside its image.
        tokens: of an answer.
    """

    engine: Engine
    reductions: tuple[dict[str, Any], ...]
    image_px: int
    requests: int = 64
    tokens: int = 64
    rounds: int = 3
    singles: int = 12
    words: int = 30


class LoadRow(_Message):
    """Medians at one reduction.

    Attributes:
        requests_per_s: at once.
        ttft_ms: one request alone, image processing included.
        itl_ms: time between tokens of one request alone.
        prompt_tokens: of one request.
        sequences: such requests that the KV cache holds.
    """

    requests_per_s: float
    ttft_ms: float
    itl_ms: float
    prompt_tokens: int
    sequences: int


class LoadRows(_Message):
    """Attributes:
    rows: one for each reduction.
    steps: scheduling steps by the mode of CUDA graphs that they ran in.
    peak_bytes: most memory on the device; None on a CPU.
    """

    rows: tuple[LoadRow, ...]
    runner: str
    steps: dict[str, int]
    peak_bytes: int | None = None


class Machine(_Message):
    """Job `machine`: whether vLLM's compiled kernels work, and what the device can do at most."""


class MachineSeen(_Message):
    """Attributes:
    silu_error: of vLLM's compiled `silu_and_mul` in bf16, relative.
    """

    device: str
    capability: str
    torch: str
    gemm_tflops: float
    copy_gb_per_s: float
    silu_error: float


class Kernels(_Message):
    """Job `kernels`: each Triton kernel against its torch reference."""


class KernelsSeen(_Message):
    """Attributes:
    failures: check -> what was wrong.
    catches_a_wrong_kernel: the check fails where a kernel is not run.
    """

    checks: int
    failures: dict[str, str]
    catches_a_wrong_kernel: bool
