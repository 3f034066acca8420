"""The stage `burst`: more images in one step than the vision tower has memory for."""

from __future__ import annotations

from foldserve.server.quality.gpu_check.bench import Bench, Failed
from foldserve.server.quality.gpu_check.common import OURS, Passed, engine
from foldserve.server.quality.gpu_check.jobs import Burst, BurstSeen

_IMAGES = 200
_PROFILED = 3
_MOST_MEMORY = 1.5
"""Limit of the burst's memory, relative to as many unreduced images as start-up measured. Without a bound on images
in the tower, the burst takes several times as much."""
_MIB = 2**20


def burst(bench: Bench) -> Passed:
    room = {"max_num_batched_tokens": _PROFILED * 144 + 100, "max_num_seqs": 64, "enable_prefix_caching": False}
    served = engine(bench, **room).model_copy(update={"serves": False})  # the server's scheduler bounds steps itself
    spec = Burst(engine=served, images=_IMAGES, reduction={"keep_tokens": 2})
    seen = bench.run("burst", "burst", spec, BurstSeen, **OURS)
    if seen.answered != _IMAGES:
        raise Failed(f"{seen.answered} of {_IMAGES} requests were answered")
    if seen.scheduled <= seen.profiled:
        raise Failed(
            f"a step had {seen.scheduled} images, no more than the {seen.profiled} measured: this was no burst"
        )
    if seen.encoded > seen.profiled:
        raise Failed(f"the tower had {seen.encoded} images at once, start-up measured {seen.profiled}")
    line = f"{_IMAGES} images, {seen.scheduled} in a step, {seen.encoded} at once in the tower as at start-up"
    if seen.plain_bytes is not None and seen.burst_bytes is not None:
        if seen.burst_bytes > _MOST_MEMORY * seen.plain_bytes:
            raise Failed(
                f"the burst took {seen.burst_bytes / _MIB:.1f} MiB, {seen.profiled} unreduced images "
                f"{seen.plain_bytes / _MIB:.1f} MiB"
            )
        line += f", with {seen.burst_bytes / seen.plain_bytes:.2f} of its memory"
    return Passed(line, seen.model_dump())
