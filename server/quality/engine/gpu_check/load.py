"""Job `load`: throughput and latency of an engine in this process, without HTTP."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

from foldserve.server.engine.processor import KWARG
from foldserve.server.engine.withdrawal.manager import DeepKVCacheManager
from foldserve.server.engine.worker import device
from foldserve.server.quality.engine.gpu_check.engine import SchedulerWatch, runner_name, scheduler_of, start_engine
from foldserve.server.quality.gpu_check.jobs import LoadJob, LoadResult, LoadRow


def run(spec: LoadJob) -> LoadResult:
    llm = start_engine(spec.engine)
    watch = SchedulerWatch(llm)
    rows = tuple(_Measured(llm, spec, reduction).row() for reduction in spec.reductions)
    peak = None if device() == "cpu" else torch.cuda.max_memory_allocated()
    return LoadResult(rows=rows, runner=runner_name(llm), steps=dict(watch.steps), peak_bytes=peak)


class _Measured:
    """Measures one reduction. All images differ, so that nothing comes from a cache."""

    def __init__(self, llm: LLM, spec: LoadJob, reduction: dict[str, Any]) -> None:
        self._llm, self._spec, self._reduction = llm, spec, reduction
        self._random = np.random.default_rng(0)
        self._singles = 0

    def row(self) -> LoadRow:
        spec = self._spec
        self._throughput()  # to warm up
        rate = median(self._throughput() for _ in range(spec.rounds))
        times = [self._one() for _ in range(spec.singles + 1)][1:]
        output = self._llm.generate([self._prompt()], self._params(1), use_tqdm=False)[0]
        return LoadRow(
            requests_per_s=rate,
            ttft_ms=1e3 * median(first for first, _ in times),
            itl_ms=1e3 * median(between for _, between in times),
            prompt_tokens=len(output.prompt_token_ids),
            sequences=self._sequences(len(output.prompt_token_ids)),
        )

    def _throughput(self) -> float:
        """Requests per second."""
        prompts = [self._prompt() for _ in range(self._spec.requests)]
        start = time.perf_counter()
        outputs = self._llm.generate(prompts, self._params(self._spec.tokens), use_tqdm=False)
        seconds = time.perf_counter() - start
        if any(len(output.outputs[0].token_ids) != self._spec.tokens for output in outputs):
            raise RuntimeError("an answer was shorter than asked for")
        return len(prompts) / seconds

    def _one(self) -> tuple[float, float]:
        """(TTFT, ITL) of one request, in seconds."""
        engine, prompt, params = self._llm.llm_engine, self._prompt(), self._params(self._spec.tokens)
        params.output_kind = RequestOutputKind.DELTA
        self._singles += 1
        start = time.perf_counter()
        engine.add_request(f"single-{id(self)}-{self._singles}", prompt, params)
        first = 0.0
        while engine.has_unfinished_requests():
            if engine.step() and not first:
                first = time.perf_counter()
        return first - start, (time.perf_counter() - first) / (self._spec.tokens - 1)

    def _params(self, tokens: int) -> SamplingParams:
        return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)

    def _prompt(self) -> dict[str, Any]:
        px = self._spec.image_px
        config = self._llm.llm_engine.vllm_config.model_config.hf_config
        image = config.image_token_id if hasattr(config, "image_token_id") else config.image_token_index
        numbers = self._random.integers(10, 250, self._spec.words).tolist()  # of tokens that every tokenizer has
        words = [number + (number == image) for number in numbers]
        prompt: dict[str, Any] = {
            "prompt_token_ids": [image, *words],
            "multi_modal_data": {"image": Image.fromarray(self._random.integers(0, 256, (px, px, 3), dtype=np.uint8))},
        }
        return prompt | ({"mm_processor_kwargs": {KWARG: self._reduction}} if self._reduction else {})

    def _sequences(self, prompt_tokens: int) -> int:
        """How many requests with their answers the KV cache holds, in whole blocks."""
        manager = scheduler_of(self._llm).kv_cache_manager
        total = prompt_tokens + self._spec.tokens
        deep = self._spec.words + self._spec.tokens if self._reduction.get("withdraw") else total
        blocks = sum(
            -(-(deep if isinstance(each, DeepKVCacheManager) else total) // each.block_size)
            for each in manager.coordinator.single_type_managers
        )
        return int((manager.block_pool.num_gpu_blocks - 1) // blocks)
