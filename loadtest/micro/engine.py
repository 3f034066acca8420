"""A vLLM engine in this process with clocks inside, for micro-benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from foldserve.reducers.plan import Reduction
from foldserve.server.engine import withdrawal


@dataclass(slots=True)
class Clock:
    """Process CPU time and wall time spent under `running`, in milliseconds.

    On a shared machine, compare CPU time. It is meaningful with one thread only, since idle OpenMP threads spin.
    """

    cpu_ms: float = 0.0
    wall_ms: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        cpu, wall = time.process_time(), time.perf_counter()
        try:
            yield
        finally:
            self.cpu_ms += (time.process_time() - cpu) * 1e3
            self.wall_ms += (time.perf_counter() - wall) * 1e3


@dataclass(frozen=True, slots=True)
class StepCost:
    """Cost of one scheduling step: the decoder's forward alone, and the whole step."""

    forward: Clock
    step: Clock
    outputs: Sequence[Any]


@dataclass(frozen=True, slots=True)
class ProbeRequest:
    """A prompt with one `<image>`, the image, the reduction (None: none is sent), and the number of output tokens."""

    prompt: Sequence[int]
    image: Image.Image
    reduction: Reduction | None = None
    tokens: int = 1


class ProbedEngine:
    """vLLM's offline engine, stepped by hand; without prefix caching, so that every prompt is computed."""

    def __init__(self, checkpoint: Path, withdraw_layer: int | None, **options: Any) -> None:
        """Starts the engine with vLLM's `options`; ValueError if vLLM would put it into another process."""
        from vllm import LLM, envs

        if envs.VLLM_ENABLE_V1_MULTIPROCESSING:
            raise ValueError("the engine has to run in this process: set VLLM_ENABLE_V1_MULTIPROCESSING=0")
        configured = {} if withdraw_layer is None else withdrawal.configure(withdraw_layer, device="cpu")
        self._llm = LLM(str(checkpoint), enable_prefix_caching=False, **(configured | options))
        core = self._llm.llm_engine.engine_core.engine_core
        self._scheduler = core.scheduler
        self._pool = core.scheduler.kv_cache_manager.block_pool
        self._managers = core.scheduler.kv_cache_manager.coordinator.single_type_managers
        runner = core.model_executor.driver_worker.worker.model_runner
        pool_bytes = runner.kv_cache_config.kv_cache_tensors[0].size  # all groups lie in one allocation
        self.block_bytes: int = pool_bytes // self._pool.num_gpu_blocks
        self.usable_blocks: int = self._pool.num_gpu_blocks - 1  # one is vLLM's null block
        self.groups = len(self._managers)
        self._forward = Clock()
        self.model: Any = runner.model
        self.model.forward = self._clocked(self.model.forward)
        self._added = 0

    @property
    def tokenizer(self) -> Any:
        return self._llm.get_tokenizer()

    @property
    def used_blocks(self) -> int:
        """KV blocks that requests hold, in all groups."""
        free: int = self._pool.get_num_free_blocks()
        return self.usable_blocks - free

    def add(self, request: ProbeRequest) -> str:
        """Adds a request, which runs from the next `step` on; returns its id in outputs."""
        from vllm import SamplingParams

        prompt: dict[str, Any] = {
            "prompt_token_ids": list(request.prompt),
            "multi_modal_data": {"image": request.image},
        }
        if request.reduction is not None:
            prompt["mm_processor_kwargs"] = {"foldserve": request.reduction.to_json()}
        params = SamplingParams(temperature=0, max_tokens=request.tokens, ignore_eos=True)
        self._added += 1
        name = str(self._added)
        self._llm.llm_engine.add_request(name, prompt, params)
        return name

    def step(self) -> StepCost:
        self._forward, whole = Clock(), Clock()
        with whole.running():
            outputs = self._llm.llm_engine.step()
        return StepCost(self._forward, whole, outputs)

    def prefill(self, request: ProbeRequest) -> StepCost:
        """Runs a request for one token, whose prompt has to fit into one step."""
        self.add(request)
        cost = self.step()
        if self._scheduler.requests:
            raise ValueError("the request did not end in one step: ask for one token, raise max_num_batched_tokens")
        return cost

    def resident(self) -> list[tuple[int, int]]:
        """(tokens in the KV cache, blocks of all groups) of each running request."""
        return [(request.num_computed_tokens, self._blocks(request.request_id)) for request in self._scheduler.running]

    def clear(self) -> None:
        """Aborts every request; RuntimeError if blocks are not given back."""
        self._llm.llm_engine.abort_request(list(self._scheduler.requests), internal=True)
        free = self._pool.get_num_free_blocks()
        if free != self.usable_blocks:
            raise RuntimeError(f"{self.usable_blocks - free} KV blocks were not given back")

    def _blocks(self, request_id: str) -> int:
        return sum(len(manager.req_to_blocks[request_id]) for manager in self._managers)

    def _clocked(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def clocked(*args: Any, **kwargs: Any) -> Any:
            with self._forward.running():
                return forward(*args, **kwargs)

        return clocked
