"""The stage `burst`: more images in one step than the vision tower has memory for."""

from __future__ import annotations

from foldserve.server.quality.gpu_check.common import OURS, StagePassed, engine
from foldserve.server.quality.gpu_check.job_runner import JobRunner, StageFailed
from foldserve.server.quality.gpu_check.jobs import BurstJob, BurstResult

_IMAGES = 200
_PROFILED = 3
_MOST_MEMORY = 1.5
"""Limit of the burst's memory, relative to as many unreduced images as start-up measured. Without a bound on images
in the tower, the burst takes several times as much."""
_MIB = 2**20


def check_burst(job_runner: JobRunner) -> StagePassed:
    room = {"max_num_batched_tokens": _PROFILED * 144 + 100, "max_num_seqs": 64, "enable_prefix_caching": False}
    unbounded = {"serves": False}  # the server's scheduler bounds steps itself
    served = engine(job_runner, **room).model_copy(update=unbounded)
    spec = BurstJob(engine=served, images=_IMAGES, reduction={"keep_tokens": 2})
    seen = job_runner.run("burst", "burst", spec, BurstResult, **OURS)
    if seen.answered != _IMAGES:
        raise StageFailed(f"{seen.answered} of {_IMAGES} requests were answered")
    if seen.scheduled <= seen.profiled:
        raise StageFailed(
            f"a step had {seen.scheduled} images, no more than the {seen.profiled} measured: this was no burst"
        )
    if seen.encoded > seen.profiled:
        raise StageFailed(f"the tower had {seen.encoded} images at once, start-up measured {seen.profiled}")
    line = f"{_IMAGES} images, {seen.scheduled} in a step, {seen.encoded} at once in the tower as at start-up"
    if seen.plain_bytes is not None and seen.burst_bytes is not None:
        if seen.burst_bytes > _MOST_MEMORY * seen.plain_bytes:
            raise StageFailed(
                f"the burst took {seen.burst_bytes / _MIB:.1f} MiB, {seen.profiled} unreduced images "
                f"{seen.plain_bytes / _MIB:.1f} MiB"
            )
        line += f", with {seen.burst_bytes / seen.plain_bytes:.2f} of its memory"
    return StagePassed(line, seen.model_dump())
