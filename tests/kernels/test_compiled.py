"""Every kernel becomes machine code for the GPUs that it is meant for; that needs no GPU, only the compiler."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from foldserve.kernels import groups, matching, picking, rows, selection
from tests.kernels.no_gpu import gpu

AMPERE, HOPPER = 80, 90

KERNELS = {
    "match": 3,
    "place": 1,
    "group_mean": 2,
    "group_sum": 2,
    "lowest_into_one": 1,
    "farthest_first": 1,
    "kv_slots": 1,
}
"""Launches of a call."""


def ints(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def calls(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """A call of each twin, shapes and strides as in the server: CLIP-L/14-336 and a decoder of width 4096."""
    x, keys, scores = torch.zeros(2, 577, 1024, dtype=dtype), torch.zeros(2, 577, 64), torch.zeros(2, 577)
    return {
        "match": partial(matching.match, x[:, 1:]),
        "match with penalty": partial(matching.match, keys, class_token=True, penalty=scores),
        "place by position": partial(selection.place, scores[:, :289], ints(2, 289), 577, 192, "position"),
        "place by score": partial(selection.place, scores[:, :289], ints(2, 289), 577, 192, "best_unmerged_first"),
        "group_mean": partial(groups.group_mean, x[:, 1:], ints(2, 576), 192),
        "group_mean of sizes": partial(groups.group_mean, x, ints(2, 577), 192, ints(2, 577)),
        "group_sum": partial(groups.group_sum, x, ints(2, 577), ints(2, 192), scores),
        "lowest_into_one": partial(selection.lowest_into_one, scores, 92),
        "farthest_first": partial(picking.farthest_first, torch.zeros(2, 576, 576), ints(2, 1), 144),
        "farthest_first of weights": partial(
            picking.farthest_first, torch.zeros(2, 576, 576), ints(2, 1), 144, scores[:, 1:]
        ),
        "kv_slots": partial(rows.kv_slots, ints(2, 64).int(), ints(600), ints(600), 16, 640),
    }


@pytest.mark.parametrize(
    ("dtype", "capability", "kernels"),
    [
        (torch.bfloat16, HOPPER, ("",)),  # all
        (torch.float32, HOPPER, ("match", "group")),  # what reads images in the model's dtype
        (torch.bfloat16, AMPERE, ("match", "group")),
    ],
    ids=["bf16-hopper", "fp32-hopper", "bf16-ampere"],
)
def test_kernels_compile(
    dtype: torch.dtype,
    capability: int,
    kernels: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    compiled: list[Any] = []
    compile_only = JITFunction.run

    def run(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append(compile_only(self, *args, warmup=True, **kwargs))

    monkeypatch.setattr(driver, "_active", gpu(capability, device=capability))
    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # the default, of which Triton warns that it will change
    chosen = {name: call for name, call in calls(dtype).items() if name.startswith(kernels)}
    for name, call in chosen.items():
        compiled.clear()
        call()
        assert len(compiled) == KERNELS[name.partition(" ")[0]]
        for kernel in compiled:
            assert len(kernel.asm["cubin"]) > 1000, name
            assert f".target sm_{capability}" in kernel.asm["ptx"], name
    assert len(chosen) >= 5
