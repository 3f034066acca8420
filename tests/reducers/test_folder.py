"""Properties of both forms of FOLDER, on random images: random tokens, or few distinct ones so that scores tie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from foldserve.reducers.fold import Reduced, fold
from foldserve.reducers.folder import folder, folder_cls
from foldserve.reducers.plan import Plan, Reduction, VisionGeometry, make_plan
from tests.reducers.naive import naive_folder, naive_folder_cls


@dataclass(frozen=True)
class Batch:
    """Images of one plan, and what their reduction needs; `folder` looks at the patches only."""

    plan: Plan
    x: Tensor  # (B, n + 1, d)
    keys: Tensor  # (B, n + 1, d_k)
    attention: Tensor  # (B, n + 1)

    @property
    def patches(self) -> Tensor:
        return self.x[:, 1:]

    def reduce(self) -> Reduced:
        if self.plan.method == "folder":
            return folder(self.patches, self.plan.folds)
        reduced = folder_cls(self.x, self.keys, self.attention, self.plan.folds)
        return Reduced(reduced.tokens[:, 1:], reduced.sizes[:, 1:], reduced.source[:, 1:] - 1, reduced.group[:, 1:] - 1)

    def rows(self, index: Any) -> Batch:
        return Batch(self.plan, self.x[index], self.keys[index], self.attention[index])

    def to(self, target: Any) -> Batch:
        return Batch(self.plan, self.x.to(target), self.keys.to(target), self.attention.to(target))


def clip(patches: int) -> VisionGeometry:
    """A tower with a class token."""
    return VisionGeometry(patches, layers=2, class_token=True)


def random_batch(plan: Plan, images: int, *, width: int, seed: int, distinct: int | None = None) -> Batch:
    """fp32 images; `distinct`: number of different tokens in them."""
    generator = torch.Generator().manual_seed(seed)
    n = plan.encoded + 1

    def tokens(width: int) -> Tensor:
        if distinct is None:
            return torch.randn(images, n, width, generator=generator)
        kinds = torch.randn(distinct, width, generator=generator)
        return kinds[torch.randint(distinct, (images, n), generator=generator)]

    return Batch(plan, tokens(width), tokens(8), tokens(1).squeeze(-1).softmax(dim=-1))


@st.composite
def batches(draw: st.DrawFn, distinct: st.SearchStrategy[int | None] = st.sampled_from([None, 1, 3])) -> Batch:  # noqa: B008
    n = draw(st.integers(3, 70))
    method = draw(st.sampled_from(["folder", "folder_cls"]))
    plan = make_plan(Reduction(method, keep_tokens=draw(st.integers(2, n - 1))), clip(n))
    shape = {"images": draw(st.integers(1, 4)), "width": draw(st.integers(1, 20))}
    return random_batch(plan, **shape, seed=draw(st.integers(0, 2**31)), distinct=draw(distinct))


@given(batches())
def test_counts_and_sizes(batch: Batch) -> None:
    images, n, width = batch.patches.shape
    tokens, sizes, source, group = batch.reduce()
    assert tokens.shape == (images, batch.plan.kept, width)
    assert sizes.shape == source.shape == (images, batch.plan.kept)
    assert group.shape == (images, n)
    assert tokens.dtype == batch.x.dtype
    assert sizes.dtype == source.dtype == group.dtype == torch.int64
    for i in range(images):
        assert torch.equal(group[i].bincount(minlength=batch.plan.kept), sizes[i])
    assert sizes.min() >= 1
    assert (sizes.sum(dim=1) == n).all()


@given(batches())
def test_tokens_are_means_of_their_groups(batch: Batch) -> None:
    tokens, sizes, _, group = batch.reduce()
    member = group.unsqueeze(1) == torch.arange(batch.plan.kept).unsqueeze(1)  # (B, n_out, n)
    patches, each = batch.patches.double(), sizes.unsqueeze(-1)
    means = member.double() @ patches / each
    # of a sum in order and its division: Higham, Accuracy and Stability of Numerical Algorithms, section 4.2
    bound = (each + 1) * 2**-24 * (member.double() @ patches.abs() / each)
    assert ((tokens.double() - means).abs() <= bound).all()
    weighted = (each * tokens.double()).sum(dim=1)
    assert ((weighted - patches.sum(dim=1)).abs() <= (each * bound).sum(dim=1) + 1e-12).all()


@given(batches())
def test_survivors(batch: Batch) -> None:
    tokens, sizes, source, group = batch.reduce()
    assert torch.equal(group.gather(1, source), torch.arange(batch.plan.kept).expand_as(source))
    originals = batch.patches.gather(1, source.unsqueeze(-1).expand_as(tokens))
    assert torch.equal(tokens[sizes == 1], originals[sizes == 1])


@given(batches())
def test_order(batch: Batch) -> None:
    source = batch.reduce().source
    if batch.plan.method == "folder":
        assert (source.diff(dim=1) > 0).all()
    elif len(batch.plan.folds) == 1:  # positions count from the class token: even ones are odd patches
        even = batch.plan.kept - (batch.plan.encoded + 1) // 2
        assert (source[:, :even] % 2 == 1).all()
        assert (source[:, even:] % 2 == 0).all()
        assert (source[:, :even].diff(dim=1) > 0).all()
        assert (source[:, even:].diff(dim=1) > 0).all()


@example(
    random_batch(make_plan(Reduction("folder", keep_tokens=2), clip(10)), images=2, width=17, seed=172, distinct=1)
)
@given(batches())
def test_same_bits_again_alone_and_in_any_order(batch: Batch) -> None:
    reduced = batch.reduce()
    images = len(batch.x)
    index: Any
    for index in (slice(None), torch.arange(images).flip(0), *(slice(i, i + 1) for i in range(images))):
        for ours, theirs in zip(batch.rows(index).reduce(), reduced, strict=True):
            assert torch.equal(ours, theirs[index])


@pytest.mark.parametrize("method", ["folder", "folder_cls"])
def test_same_bits_alone_at_full_size(method: str) -> None:
    batch = random_batch(make_plan(Reduction(method, ratio=0.66), clip(576)), 3, width=1024, seed=0)
    together = batch.reduce()
    alone = batch.rows(slice(1, 2)).reduce()
    assert all(torch.equal(a, t[1:2]) for a, t in zip(alone, together, strict=True))


@given(batches(distinct=st.none()))
def test_same_as_written_token_by_token(batch: Batch) -> None:
    assume(batch.x.shape[-1] > 1)  # in one dimension every cosine is 1 or -1
    batch = batch.to(torch.float64)
    tokens, sizes, source, _ = batch.reduce()
    for i in range(len(batch.x)):
        if batch.plan.method == "folder":
            expected, first = naive_folder(batch.patches[i], batch.plan.folds), 0
        else:
            expected = naive_folder_cls(batch.x[i], batch.keys[i], batch.attention[i], batch.plan.folds)
            first = 1  # the class token is not counted
        assert [token.members[0] - first for token in expected] == source[i].tolist()
        assert [len(token.members) for token in expected] == sizes[i].tolist()
        torch.testing.assert_close(tokens[i], torch.stack([token.value for token in expected]))


@given(batches(), st.sampled_from([torch.bfloat16, torch.float16]))
def test_half_precision_is_fp32_inside(batch: Batch, dtype: torch.dtype) -> None:
    half = batch.to(dtype)
    reduced, exact = half.reduce(), half.to(torch.float32).reduce()
    assert torch.equal(reduced.tokens, exact.tokens.to(dtype))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(reduced[1:], exact[1:], strict=True))
    assert (reduced.sizes.sum(dim=1) == batch.plan.encoded).all()


@pytest.mark.parametrize("order", ["position", "unmerged_first"])
def test_ties_go_to_the_first(order: Any) -> None:
    same = torch.ones(2, 9, 1)
    kept_token = fold(same, 3, order=order).kept_token
    left = [1, 3, 5, 6, 7, 8] if order == "position" else [6, 8, 1, 3, 5, 7]
    assert kept_token.tolist() == [left, left]
    assert fold(same, 3, order=order).sizes.sum(dim=1).tolist() == [9, 9]
    assert fold(same, 3, order="position", class_token=True).kept_token[0].tolist() == [0, 1, 3, 5, 7, 8]


@given(batches())
def test_class_token_neither_goes_nor_receives(batch: Batch) -> None:
    outside = folder(batch.x, batch.plan.folds, class_token=True)
    inside = folder_cls(batch.x, batch.keys, batch.attention, batch.plan.folds)
    for tokens, sizes, source, group in (outside, inside):
        assert torch.equal(tokens[:, 0], batch.x[:, 0])
        assert (sizes[:, 0] == 1).all()
        assert (source[:, 0] == 0).all()
        assert (group[:, 0] == 0).all()


def test_no_folds_is_the_identity() -> None:
    x = torch.randn(2, 9, 4).bfloat16()
    assert torch.equal(folder(x, ()).tokens, x)
    assert torch.equal(folder_cls(x, x, x[..., 0], ()).tokens, x)


@pytest.mark.parametrize("k", [0, -1, 5])
def test_a_fold_refuses_more_than_half(k: int) -> None:
    with pytest.raises(ValueError, match="1 to 4 of them"):
        fold(torch.randn(1, 8, 4), k, order="position")


def test_a_class_token_is_not_one_of_the_half() -> None:
    with pytest.raises(ValueError, match="1 to 3 of them"):
        fold(torch.randn(1, 8, 4), 4, order="position", class_token=True)


@pytest.mark.parametrize("method", ["folder", "folder_cls"])
def test_no_value_is_read_on_the_host(method: str) -> None:
    """Meta tensors have no values: a host-device sync or a data-dependent shape would raise."""
    batch = random_batch(make_plan(Reduction(method, ratio=0.9), clip(576)), 2, width=16, seed=0).to("meta")
    assert batch.reduce().tokens.shape == (2, 58, 16)


class PrecisionOfProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the precision that each matrix product runs with."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            self.seen.append(torch.get_float32_matmul_precision())
        return func(*args, **(kwargs or {}))


def test_matching_is_in_true_fp32_whatever_the_process_allows() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with PrecisionOfProducts() as products:
            folder(torch.randn(2, 17, 8), (8, 2))
        assert products.seen == ["highest", "highest"]
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("device", "precision"), [("cuda", "tf32"), ("mkldnn", "tf32"), ("mkldnn", "bf16")])
def test_matching_is_in_true_fp32_where_less_was_allowed_by_torchs_newer_settings(device: str, precision: str) -> None:
    """They make `torch.get_float32_matmul_precision` raise."""
    products_on_device = getattr(torch.backends, device).matmul
    products_on_device.fp32_precision = precision
    try:
        with PrecisionOfProducts() as products:
            folder(torch.randn(2, 17, 8), (8, 2))
        assert products.seen == ["highest", "highest"]
        assert products_on_device.fp32_precision == precision
    finally:
        torch.set_float32_matmul_precision("highest")
