"""Properties of every reduction of a batch, and two ways of running it that must give the same result."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from hypothesis import settings
from torch import Tensor

from foldserve.reducers.fold import Reduced

Reduce = Callable[..., Reduced]

few = settings(max_examples=25)
"""For properties that run a reduction several times over, or a slow twin of it."""


def draw(seed: int, *shapes: Sequence[int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """One standard normal tensor of each shape."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tuple(shape), generator=generator).to(dtype) for shape in shapes]


def assert_partition(reduced: Reduced, n: int, kept: int, *, own_sizes: Tensor | None = None) -> None:
    """Shapes and types; `sizes`, `group` and `source` tell the same story of n tokens, none lost."""
    tokens, sizes, source, group = reduced
    batch = len(tokens)
    assert tokens.shape[1] == kept
    assert sizes.shape == source.shape == (batch, kept)
    assert group.shape == (batch, n)
    assert sizes.dtype == source.dtype == group.dtype == torch.int64
    own_sizes = torch.ones_like(group) if own_sizes is None else own_sizes
    counted = torch.zeros_like(sizes).scatter_add(1, group, own_sizes)
    assert torch.equal(counted, sizes)
    assert torch.equal(sizes.sum(dim=1), own_sizes.sum(dim=1))
    assert torch.equal(group.gather(1, source), torch.arange(kept).expand_as(source))


def assert_same_bits_alone(reduce: Reduce, *inputs: Tensor) -> None:
    """An image gives the same bits by itself as in a batch, and again."""
    together = reduce(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(reduce(*inputs), together, strict=True))
    for i in range(len(inputs[0])):
        alone = reduce(*(x[i : i + 1] for x in inputs))
        assert all(torch.equal(a, b[i : i + 1]) for a, b in zip(alone, together, strict=True))


def assert_fp32_inside(reduce: Reduce, x: Tensor, *others: Tensor) -> None:
    """bf16 and fp16 tokens give what their fp32 values give, rounded once; the decisions are the same."""
    for dtype in (torch.bfloat16, torch.float16):
        half, exact = reduce(x.to(dtype), *others), reduce(x.to(dtype).float(), *others)
        assert half.tokens.dtype == dtype
        assert torch.equal(half.tokens, exact.tokens.to(dtype))
        assert all(torch.equal(a, b) for a, b in zip(half[1:], exact[1:], strict=True))


def assert_nothing_read(reduce: Reduce, *inputs: Tensor) -> None:
    """Meta tensors have no values: a host-device sync or a shape that depends on data would raise."""
    expected = reduce(*inputs).tokens.shape
    assert reduce(*(x.to("meta") for x in inputs)).tokens.shape == expected
