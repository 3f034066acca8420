"""Attention that methods ask for, against loops over heads and queries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from foldserve.reducers.attention import LayerAttention, PatchAttention
from tests.reducers.check import draw, few


def naive_probabilities(layer: LayerAttention) -> Tensor:
    """(B, heads, n, n), one row at a time."""
    batch, n, heads, _ = layer.query.shape
    out = torch.zeros(batch, heads, n, n, dtype=layer.query.dtype)
    for b in range(batch):
        for h in range(heads):
            for q in range(n):
                logits = layer.key[b, :, h] @ layer.query[b, q, h] * layer.scale
                if layer.key_bias is not None:
                    logits = logits + layer.key_bias[b]
                out[b, h, q] = logits.exp() / logits.exp().sum()
    return out


@few
@given(
    st.tuples(st.integers(1, 2), st.sampled_from([1, 2, 63, 64, 65, 130]), st.integers(1, 3), st.integers(1, 4)),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_same_as_row_by_row(shape: tuple[int, int, int, int], bias: bool, seed: int) -> None:
    query, key, sizes = draw(seed, shape, shape, shape[:2], dtype=torch.float64)
    layer = LayerAttention(query, key, 0.3, key_bias=sizes if bias else None)
    whole = naive_probabilities(layer)
    torch.testing.assert_close(layer.attention_received(), whole.mean(dim=(1, 2)))
    torch.testing.assert_close(layer.class_attention(), whole[:, :, 0].mean(dim=1))
    torch.testing.assert_close(layer.keys(), key.mean(dim=2))
    assert layer.attention_received().sum(dim=1).allclose(torch.ones((), dtype=torch.float64))


def test_a_token_of_several_patches_has_their_mean() -> None:
    query, key = draw(0, (2, 12, 3, 4), (2, 12, 3, 4), dtype=torch.float64)
    tokens, patches = PatchAttention(query, key, 0.3, patches=4), LayerAttention(query, key, 0.3)
    for own, each in ((tokens.keys(), patches.keys()), (tokens.attention_received(), patches.attention_received())):
        assert own.shape[1] == 3
        torch.testing.assert_close(own[:, 1], each[:, 4:8].mean(dim=1))


def test_key_projections_are_the_keys_without_their_rotation() -> None:
    query, key, unrotated = draw(0, (2, 12, 3, 4), (2, 12, 3, 4), (2, 12, 3, 4))
    assert torch.equal(LayerAttention(query, key, 0.3).key_projections(), key.mean(dim=2))
    layer = PatchAttention(query, key, 0.3, unrotated_key=unrotated, patches=4)
    torch.testing.assert_close(layer.key_projections()[:, 1], unrotated[:, 4:8].mean(dim=(1, 2)))
    torch.testing.assert_close(layer.keys()[:, 1], key[:, 4:8].mean(dim=(1, 2)))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_agree_with_one(ranks: int) -> None:
    """Heads on several ranks give what all of them give on one, wherever the mean over ranks stands."""
    query, key = draw(0, (2, 70, 4, 8), (2, 70, 4, 8))
    index = torch.tensor([[3, 0, 69], [5, 6, 7]])
    asked: dict[str, Any] = {
        "keys": LayerAttention.keys,
        "class_attention": LayerAttention.class_attention,
        "attention_received": LayerAttention.attention_received,
        "as_one_head": LayerAttention.class_attention_as_one_head,
        "key_cosine": lambda layer: layer.key_cosine(index),
    }
    whole = LayerAttention(query, key, 0.35)
    flat = key.flatten(2)
    cosine = torch.nn.functional.cosine_similarity(
        flat.gather(1, index[..., None].expand(-1, -1, 32))[:, :, None], flat[:, None], dim=-1
    )
    torch.testing.assert_close(whole.key_cosine(index), cosine, atol=1e-6, rtol=1e-5)
    one_head = (query[:, :1].flatten(2) @ flat.mT / 32**0.5).softmax(dim=-1).squeeze(1)
    torch.testing.assert_close(whole.class_attention_as_one_head(), one_head)
    for name, ask in asked.items():
        torch.testing.assert_close(_on_ranks(ask, query, key, ranks), ask(whole), atol=1e-6, rtol=1e-5, msg=name)


def _on_ranks(ask: Any, query: Tensor, key: Tensor, ranks: int) -> Tensor:
    """The answer of the first of some ranks, each of which is run with what the others contributed."""
    seen: list[list[Tensor]] = []  # of each rank, what it gave to each mean
    means: list[Tensor] = []
    while True:  # each round settles one mean more
        seen = []
        answers = []
        for q, k in zip(query.chunk(ranks, dim=2), key.chunk(ranks, dim=2), strict=True):
            given: list[Tensor] = []

            def mean(x: Tensor, given: list[Tensor] = given) -> Tensor:
                given.append(x)
                return means[len(given) - 1] if len(given) <= len(means) else x

            answers.append(ask(LayerAttention(q, k, 0.35, ranks=ranks, mean_over_ranks=mean)))
            seen.append(given)
        if len(means) == len(seen[0]):
            assert all(torch.equal(answer, answers[0]) for answer in answers)  # equal on all ranks
            return answers[0]
        means.append(torch.stack([given[len(means)] for given in seen]).mean(dim=0))


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the size of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numbers = max(self.numbers, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)), 0)
        return out


def test_attention_of_all_queries_is_never_held() -> None:
    query, key = draw(0, (1, 729, 4, 8), (1, 729, 4, 8))
    with LargestTensor() as largest:
        LayerAttention(query, key, 0.35).attention_received()
    assert largest.numbers == 4 * 64 * 729


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_fp32_inside(dtype: torch.dtype) -> None:
    query, key = draw(0, (2, 70, 4, 8), (2, 70, 4, 8), dtype=dtype)
    half, exact = LayerAttention(query, key, 0.35), LayerAttention(query.float(), key.float(), 0.35)
    for ask in (LayerAttention.keys, LayerAttention.class_attention, LayerAttention.attention_received):
        assert torch.equal(ask(half), ask(exact))


def test_same_bits_again() -> None:
    query, key = draw(0, (3, 577, 4, 8), (3, 577, 4, 8))
    layer = LayerAttention(query, key, 0.35)
    for ask in (LayerAttention.keys, LayerAttention.class_attention, LayerAttention.attention_received):
        assert torch.equal(ask(layer), ask(layer))
