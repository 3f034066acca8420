"""An engine in this process, and counts of what its scheduler does."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from PIL import Image
from vllm import LLM, SamplingParams

from foldserve.server.engine import withdrawal
from foldserve.server.engine.processor import KWARG
from foldserve.server.engine.scheduler import make_scheduler
from foldserve.server.engine.worker import WORKERS, device
from foldserve.server.quality.gpu_check.jobs import EngineSpec
from foldserve.server.settings import CONFIG_KEY

_SERVES = f"{make_scheduler.__module__}.{make_scheduler.__qualname__}"


def start_engine(spec: EngineSpec) -> LLM:
    """An engine with the classes that `foldserve serve` adds, or, without `spec.foldserve`, plain vLLM."""
    arguments: dict[str, Any] = {
        "seed": 0,
        "limit_mm_per_prompt": {"image": 2},
        "disable_log_stats": False,
        "cudagraph_metrics": True,
        "enable_prefix_caching": True,
    } | spec.arguments
    if spec.foldserve:
        ours: dict[str, Any] = {"masks_padding_rows": True, **spec.settings}  # as a server does
        if spec.withdraw_layer is not None:
            runs_ahead = arguments.get("async_scheduling") is not False
            arguments |= withdrawal.configure(spec.withdraw_layer, device=device(), async_scheduling=runs_ahead)
            ours["withdraw_layer"] = spec.withdraw_layer
        else:
            arguments |= {"worker_cls": WORKERS[device()]} | ({"scheduler_cls": _SERVES} if spec.serves else {})
        arguments["additional_config"] = {CONFIG_KEY: ours}
    return LLM(str(spec.model), **arguments)


def noise_answers(
    llm: LLM, count: int, seed: int, reduction: dict[str, Any] | None, tokens: int = 1
) -> list[list[int]]:
    """Sends `count` requests at once, each with an image of noise. Returns the ids of each answer."""
    size = llm.llm_engine.vllm_config.model_config.hf_config.vision_config.image_size
    random = np.random.default_rng(seed)
    prompts = []
    for pixels in random.integers(0, 256, (count, size, size, 3), dtype=np.uint8):
        prompt: dict[str, Any] = {
            "prompt": "<s>USER: <image>\nWhat is in the picture? ASSISTANT:",
            "multi_modal_data": {"image": Image.fromarray(pixels)},
        }
        prompts.append(prompt if reduction is None else prompt | {"mm_processor_kwargs": {KWARG: reduction}})
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def scheduler_of(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def model_of(llm: LLM) -> Any:
    return runner_of(llm).get_model()


def runner_of(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def runner_name(llm: LLM) -> str:
    return "v2" if llm.llm_engine.vllm_config.use_v2_model_runner else "v1"


class SchedulerWatch:
    """Counts what an engine's scheduler does from now on.

    Attributes:
        steps: number of steps by CUDA graph mode.
        images: most images that one step encoded.
    """

    def __init__(self, llm: LLM) -> None:
        self.steps: Counter[str] = Counter()
        self.preemptions = 0
        self.images = 0
        self._scheduler = scheduler_of(llm)
        self._schedule, self._make_stats = self._scheduler.schedule, self._scheduler.make_stats
        self._scheduler.schedule, self._scheduler.make_stats = self._scheduled, self._counting_make_stats

    @property
    def held_blocks(self) -> int:
        pool = self._scheduler.kv_cache_manager.block_pool
        held: int = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # one is vLLM's null block
        return held

    def _scheduled(self, *args: Any, **options: Any) -> Any:
        step = self._schedule(*args, **options)
        self.preemptions += len(step.preempted_req_ids or ())
        self.images = max(self.images, sum(map(len, step.scheduled_encoder_inputs.values())))
        return step

    def _counting_make_stats(self, *args: Any, **options: Any) -> Any:
        stats = self._make_stats(*args, **options)
        if stats is not None and stats.cudagraph_stats is not None:
            self.steps[stats.cudagraph_stats.runtime_mode] += 1
        return stats
