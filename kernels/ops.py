"""Chooses, once per process, whether operations of `foldserve.reducers` run as Triton kernels."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from foldserve.reducers.divprune import farthest_first
from foldserve.reducers.fold import group_mean, group_sum, match, place
from foldserve.reducers.illava import lowest_into_one
from foldserve.reducers.ops import Op
from foldserve.reducers.withdraw import kv_slots

OPS: tuple[Op[..., Any], ...] = (match, place, group_mean, group_sum, lowest_into_one, farthest_first, kv_slots)


def select_kernels(device: torch.device, *, triton: bool) -> bool:
    """Make `OPS` run as Triton kernels if `triton`, `device` is a GPU and Triton is installed; else as references.

    A process that runs the kernels can reduce only on the GPU. A later call chooses anew.

    Returns:
        Whether kernels run; `warm_up` compiles them.
    """
    if triton and device.type == "cuda" and find_spec("triton"):
        _use_triton()
        return True
    for op in OPS:
        op.use(None)
    return False


def _use_triton() -> None:
    from foldserve.kernels import groups, matching, picking, rows, selection  # these import triton

    match.use(matching.match)
    place.use(selection.place)
    group_mean.use(groups.group_mean)
    group_sum.use(groups.group_sum)
    lowest_into_one.use(selection.lowest_into_one)
    farthest_first.use(picking.farthest_first)
    kv_slots.use(rows.kv_slots)
