"""Job `burst`: many images at once that keep so few tokens that one step has room for dozens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from vllm import LLM

from foldserve.server.engine.encoder_budget import encoder_budget
from foldserve.server.engine.worker import device
from foldserve.server.quality.engine.gpu_check.engine import SchedulerWatch, model_of, noise_answers, start_engine
from foldserve.server.quality.gpu_check.jobs import BurstJob, BurstResult


def run(spec: BurstJob) -> BurstResult:
    llm = start_engine(spec.engine)
    profiled = encoder_budget(llm.llm_engine.vllm_config).images
    noise_answers(llm, profiled, 1, None)  # warm-up
    with _memory() as plain:
        noise_answers(llm, profiled, 2, None)
    watch = SchedulerWatch(llm)
    with _memory() as burst, _encoded(llm) as encoded:
        answers = noise_answers(llm, spec.images, 3, spec.reduction)
    return BurstResult(
        profiled=profiled,
        scheduled=watch.images,
        encoded=max(encoded),
        answered=sum(len(ids) == 1 for ids in answers),
        plain_bytes=plain.get("bytes"),
        burst_bytes=burst.get("bytes"),
    )


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
