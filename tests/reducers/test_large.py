"""Large images, whose scores and copies are computed in parts: the same bits, in memory linear in the tokens."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from foldserve.reducers import fold
from foldserve.reducers.attention import LayerAttention
from foldserve.reducers.cdpruner import cdpruner
from foldserve.reducers.divprune import divprune
from foldserve.reducers.folder import folder, folder_cls
from foldserve.reducers.illava import illava
from foldserve.reducers.pool import pool
from foldserve.reducers.tome import tome
from foldserve.reducers.visionzip import visionzip

FEW = 2**14
"""In the place of `AT_ONCE`: the whole of 300 tokens has 22,500 scores."""


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(
    batch=st.integers(1, 4),
    tokens=st.integers(2, 400),
    width=st.sampled_from([8, 64, 100, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_matching(batch: int, tokens: int, width: int, dtype: torch.dtype, seed: int) -> None:
    metric = drawn(batch, tokens, width, dtype=dtype, seed=seed)
    whole = fold.match(metric)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fold, "AT_ONCE", FEW)
        parts = fold.match(metric)
    assert all(map(torch.equal, whole, parts))


REDUCE: dict[str, Callable[[Tensor], fold.Reduced]] = {
    "folder": lambda x: folder(x, (100, 60)),
    "folder official": lambda x: folder(x, (100, 60), scale="official"),
    "folder deepstack": lambda x: folder(x, (40,), metric=x[..., :128]),
    "folder_cls": lambda x: folder_cls(x, x[..., :64], x[..., 0].softmax(-1), (100, 60)),
    "tome": lambda x: tome(x, x[..., :64], torch.ones(x.shape[:2], dtype=torch.int64), 90, class_token=False),
    "illava": lambda x: illava(x, x[..., 0], 90),
    "visionzip": lambda x: visionzip(x, x[..., 0], x[..., :64], 100, 30),
    "divprune": lambda x: divprune(x, 60, rest="merge"),
    "divprune centered": lambda x: divprune(x, 60, geometry="centered"),
    "cdpruner": lambda x: cdpruner(x, 60),
    "pool": lambda x: pool(x, (15, 20), (5, 5)),
    "pool with a rest": lambda x: pool(x, (15, 20), (4, 4)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", REDUCE)
def test_methods(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = drawn(3, 300, 1000, dtype=dtype)
    whole = REDUCE[name](x)
    monkeypatch.setattr(fold, "AT_ONCE", FEW)
    parts = REDUCE[name](x)
    assert all(map(torch.equal, whole, parts)) and parts.tokens.dtype == dtype


class Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that are made; `most` is what was alive at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for made in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, Tensor)):
            if made._cdata not in given and made._cdata not in self._alive:
                self._alive[made._cdata] = made.nbytes()
                weakref.finalize(made, self._alive.pop, made._cdata, None)
        self.most = max(self.most, sum(self._alive.values()))
        return out


@pytest.mark.parametrize("name", ["folder deepstack", "illava", "tome", "divprune", "divprune centered", "cdpruner"])
def test_memory_grows_with_the_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the scores alone four times as many bytes are the price of twice the tokens."""

    def peak(tokens: int) -> int:
        x = drawn(1, tokens, 256, dtype=torch.bfloat16)
        with Peak() as seen:
            REDUCE[name](x)
        return seen.most

    monkeypatch.setattr(fold, "AT_ONCE", 2**18)
    assert peak(4096) < 2.3 * peak(2048)


def test_attention_received_is_never_held_whole() -> None:
    def peak(patches: int) -> int:
        seen = LayerAttention(drawn(1, patches, 2, 16), drawn(1, patches, 2, 16), 0.25)
        with Peak() as memory:
            seen.attention_received()
        return memory.most

    assert peak(4096) < 2.3 * peak(2048)
