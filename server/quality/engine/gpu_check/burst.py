"""Job `burst`: many images at once that keep so few tokens that one step has room for dozens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from vllm import LLM, SamplingParams

from foldserve.server.engine.encoder_budget import encoder_budget
from foldserve.server.engine.processor import KWARG
from foldserve.server.engine.worker import device
from foldserve.server.quality.engine.gpu_check.engine import SchedulerWatch, model_of, start_engine
from foldserve.server.quality.gpu_check.jobs import BurstJob, BurstResult


def run(spec: BurstJob) -> BurstResult:
    llm = start_engine(spec.engine)
    profiled = encoder_budget(llm.llm_engine.vllm_config).images
    _ask(llm, profiled, 1, None)  # warm-up
    with _memory() as plain:
        _ask(llm, profiled, 2, None)
    watch = SchedulerWatch(llm)
    with _memory() as burst, _encoded(llm) as encoded:
        answered = _ask(llm, spec.images, 3, spec.reduction)
    return BurstResult(
        profiled=profiled,
        scheduled=watch.images,
        encoded=max(encoded),
        answered=answered,
        plain_bytes=plain.get("bytes"),
        burst_bytes=burst.get("bytes"),
    )


def _ask(llm: LLM, count: int, seed: int, reduction: dict[str, Any] | None) -> int:
    """Sends `count` requests, each with an image of noise. Returns how many were answered."""
    size = llm.llm_engine.vllm_config.model_config.hf_config.vision_config.image_size
    random = np.random.default_rng(seed)
    prompts = []
    for pixels in random.integers(0, 256, (count, size, size, 3), dtype=np.uint8):
        prompt: dict[str, Any] = {
            "prompt": "<s>USER: <image>\nWhat is in the picture? ASSISTANT:",
            "multi_modal_data": {"image": Image.fromarray(pixels)},
        }
        prompts.append(prompt if reduction is None else prompt | {"mm_processor_kwargs": {KWARG: reduction}})
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True), use_tqdm=False)
    return sum(len(output.outputs[0].token_ids) == 1 for output in outputs)


@contextmanager
def _encoded(llm: LLM) -> Iterator[list[int]]:
    """Collects the number of images in each run of the vision tower."""
    seen: list[int] = []
    first = model_of(llm).vision_tower.vision_model.embeddings.patch_embedding  # every path goes through it, and once
    hook = first.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    try:
        yield seen
    finally:
        hook.remove()


@contextmanager
def _memory() -> Iterator[dict[str, int]]:
    """Collects, as `bytes`, the peak of the memory allocated inside, above that before; nothing on a CPU."""
    found: dict[str, int] = {}
    if device() == "cpu":
        yield found
        return
    torch.accelerator.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield found
    torch.accelerator.synchronize()
    found["bytes"] = torch.cuda.max_memory_allocated() - before
