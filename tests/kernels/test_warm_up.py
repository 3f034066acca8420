"""`warm_up` compiles every kernel variant that a server launches, so that no request has to wait for a compilation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from triton import knobs
from triton.runtime import driver

from foldserve.kernels import ops
from foldserve.kernels.warm_up import Widths, warm_up
from foldserve.reducers import METHODS
from foldserve.reducers.attention import LayerAttention
from foldserve.reducers.method import AfterProjector, AfterTower, InTower, ScoredInDecoder
from foldserve.reducers.ops import Op
from foldserve.reducers.plan import InvalidReduction, Plan, Reduction, VisionGeometry, make_plan
from foldserve.server.engine.withdrawal.batch import BatchMaps
from foldserve.server.engine.withdrawal.core import TokenMap
from foldserve.server.engine.withdrawal.metadata import DeviceBatch, compact
from tests.engine.withdrawal.test_metadata import BLOCK, IMAGE, TEXT, common
from tests.kernels.no_gpu import gpu
from tests.kernels.test_ops import TWINS

WIDTHS = Widths(tower=64, head=16, embedding=80, decoder=48)
CPU = torch.device("cpu")
Variant = tuple[str, str]


@pytest.fixture
def variants(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], set[Variant]]]:
    """Lets each operation look up the variants of its kernels and compute by the reference; gives those looked up."""
    found: set[Variant] = set()

    def note(*, key: Any, fn: Any, **about: Any) -> bool:
        found.add((fn.name, str(key)))
        return True  # not to be compiled

    def both(op: Op[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            TWINS[op.reference.__name__](*args, **options)
            return op.reference(*args, **options)

        return run

    def taken() -> set[Variant]:
        seen = set(found)
        found.clear()
        return seen

    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # the default, of which Triton warns that it will change
    monkeypatch.setattr(driver, "_active", gpu(90, device=-1))  # for which nothing is compiled
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", note)
    for op in ops.OPS:
        op.use(both(op))
    yield taken
    for op in ops.OPS:
        op.use(None)


OPTIONS: dict[str, list[dict[str, Any]]] = {
    "illava": [{"layers": [0, 2]}],
    "divprune": [{}, {"rest": "merge"}, {"geometry": "centered"}],
}


def served(dtype: torch.dtype) -> None:
    """Each method, by several ratios and in batches of several sizes, of towers with and without a class token."""
    for class_token in (True, False):
        for tokens, layers in ((64, 3), (121, 6)):
            geometry = VisionGeometry(tokens, None, layers, class_token=class_token)
            for name, method in METHODS.items():
                if isinstance(method, ScoredInDecoder):
                    reduce_in_decoder(method, tokens, dtype)
                for options, ratio in product(OPTIONS.get(name, [{}]), (0.1, 0.4, 0.66, 0.9)):
                    try:
                        plan = make_plan(Reduction.parse({"method": name, "ratio": ratio, **options}), geometry)
                    except InvalidReduction:
                        continue
                    for images in (1, 2, 3):
                        reduce(plan, geometry, images, dtype)


def reduce(plan: Plan, geometry: VisionGeometry, images: int, dtype: torch.dtype) -> None:
    method = plan.reducer
    if isinstance(method, AfterTower):
        width = WIDTHS.embedding if isinstance(method, AfterProjector) else WIDTHS.tower
        whole = torch.randn(images, geometry.tokens + geometry.class_token, width or 0).to(dtype)
        method.reduce(torch.stack(list(whole[:, int(geometry.class_token) :])), plan)
    if isinstance(method, InTower):
        x = torch.randn(images, geometry.tokens + geometry.class_token, WIDTHS.tower).to(dtype)
        sizes = torch.ones(x.shape[:2], dtype=torch.int64)
        for layer in range(geometry.layers):
            if removed := plan.removed_in(layer):
                qkv = torch.randn(*x.shape[:2], 3, 4, WIDTHS.head).to(dtype)
                attention = LayerAttention(qkv[:, :, 0], qkv[:, :, 1], 0.5, class_token=geometry.class_token)
                x, sizes, *_ = method.reduce(x, sizes, attention, removed, plan)


def reduce_in_decoder(method: ScoredInDecoder, tokens: int, dtype: torch.dtype) -> None:
    addends, scores = torch.randn(tokens + 40, 2 * 48).to(dtype), torch.rand(tokens + 40)
    for first in (0, 5, 16):
        own = slice(first, first + tokens)
        method.reduce(addends[own][None], scores[own][None], tokens // 3)


def steps() -> None:
    """Withdrawal's steps: whole prompts, chunks, decoding requests, padded and not."""
    for maps, computed, scheduled, requests, rows in (
        ([TEXT, IMAGE, IMAGE], [0, 3, 0], [3, 4, 9], 3, 16),
        ([IMAGE, TEXT], [8, 0], [2, 3], 4, 8),
        ([IMAGE, IMAGE, TokenMap([(0, 9)], 10)], [12, 5, 3], [1, 1, 1], 4, 4),
        ([IMAGE], [0], [10], 1, 10),
    ):
        batch = BatchMaps(maps).step(np.array(computed), np.array(scheduled))
        assert batch is not None
        compact(common(computed, scheduled, requests, rows), DeviceBatch.of(batch, CPU), BLOCK)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_nothing_is_left_to_a_request(variants: Callable[[], set[Variant]], dtype: torch.dtype) -> None:
    warm_up(WIDTHS, dtype, CPU)
    warmed = variants()
    served(dtype)
    steps()
    launched = variants()
    assert launched == warmed  # no more, and none in vain
    assert len({name for name, _ in launched}) == 9
    warm_up(Widths(tower=72, head=16, embedding=80, decoder=48), dtype, CPU)
    assert not launched <= variants()
