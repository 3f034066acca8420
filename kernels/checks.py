"""Kernels against their torch references, for `foldserve gpu-check` and, in Triton's interpreter, the tests.

Result memory is poisoned: elements that a kernel does not write hold NaN or the largest integer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from foldserve.kernels import groups, matching, ops, picking, rows, selection
from foldserve.reducers.divprune import divprune, farthest_first
from foldserve.reducers.fold import Fold, Order, Reduced, group_mean, group_sum, match, place
from foldserve.reducers.folder import folder, folder_cls
from foldserve.reducers.illava import illava, lowest_into_one
from foldserve.reducers.schedule import fold_schedule
from foldserve.reducers.tome import tome, turbo
from foldserve.reducers.withdraw import kv_slots

Values = Literal["random", "few", "nan"]
Layout = Literal["contiguous", "sliced", "transposed"]


@contextmanager
def poisoned() -> Iterator[None]:
    """Deterministic mode, in which torch fills new memory; `warn_only` for CUDA operators that do not support it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def draw(shape: tuple[int, ...], seed: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def integers(shape: tuple[int, ...], low: int, high: int, seed: int, device: str) -> Tensor:
    """int64 in [low, high), the same for a seed on every device."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(device)


def laid_out(x: Tensor, layout: Layout) -> Tensor:
    """The same values with other strides: a slice of a larger tensor, or with the last dimension outermost."""
    if layout == "sliced":
        larger = x.new_full((x.shape[0], x.shape[1] + 1, *[size + 3 for size in x.shape[2:]]), torch.nan)
        view = larger[:, 1:] if x.dim() == 2 else larger[:, 1:, 1:-2]
        return view.copy_(x)
    return x.mT.contiguous().mT if layout == "transposed" else x


def check_match(device: str, n: int, width: int, dtype: torch.dtype, values: Values, layout: Layout) -> None:
    """Scores agree to 2e-6, partners are within 1e-6 of the best in fp64; the same partners if arithmetic is exact."""
    images = 3 if n < 200 else 1
    x, penalty = draw((images, n, width), n, device, dtype), laid_out(draw((images, n), 1, device), layout)
    if values == "few":  # cosines of +-1/4 in 16 channels are exact, and many are equal
        assert width == 16
        x = integers((images, n, 16), 0, 2, n, device).to(dtype) / 2 - 0.25
    if values == "nan":
        x[0, n // 2] = x[1, 0] = torch.nan
        x[-1, n - 1] = 0
    x = laid_out(x, layout)
    for class_token, of_class in ((False, None), (True, penalty)):
        with poisoned():
            score, partner = matching.match(x, class_token=class_token, penalty=of_class)
        expected, best = match.reference(x, class_token=class_token, penalty=of_class)
        assert score.dtype == expected.dtype and partner.dtype == best.dtype
        torch.testing.assert_close(score, expected, atol=2e-6, rtol=0, equal_nan=True)
        if values == "random":
            exact = torch.nn.functional.normalize(x.double(), dim=-1)
            cosine = exact[:, 0::2] @ exact[:, 1::2].mT
            assert (cosine.gather(2, partner.unsqueeze(2)).squeeze(2) >= cosine.amax(2) - 1e-6).all()
        else:
            assert torch.equal(partner, best)
        if images > 1:
            alone, _ = matching.match(x[1:2], class_token=class_token, penalty=penalty[1:2] if class_token else None)
            torch.testing.assert_close(alone, score[1:2], atol=0, rtol=0, equal_nan=True)


def scores(shape: tuple[int, int], values: Values, device: str) -> Tensor:
    """Random; "few" different values, so that most are equal; or "nan", with values that are not finite."""
    if values == "random":
        return draw(shape, shape[1], device)
    few = integers(shape, 0, 3, shape[1], device).float() - 1  # -1, 0 and 1, and -0 below
    few[:, 0::2] *= -1
    if values == "nan":
        few[:, ::5], few[:, 1::7], few[:, 2::11] = torch.nan, torch.inf, -torch.inf
    return few


def check_place(device: str, n: int, order: Order, values: Values) -> None:
    even, odd = (n + 1) // 2, n // 2
    score, partner = scores((2, even), values, device), integers((2, even), 0, odd, n, device)
    for k in sorted(({1, odd // 2, odd} if n < 200 else {odd // 2}) - {0}):
        with poisoned():
            placed = selection.place(laid_out(score, "sliced"), laid_out(partner, "transposed"), n, k, order)
        expected = place.reference(score, partner, n, k, order)
        for name, ours, theirs in zip(Fold._fields, placed, expected, strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), (k, name)


def check_lowest_into_one(device: str, n: int, values: Values) -> None:
    score = scores((2, n), values, device)
    for r in sorted({0, n // 3, n - 1} if n < 200 else {n // 3}):
        with poisoned():
            found = selection.lowest_into_one(laid_out(score, "sliced"), r)
        expected = lowest_into_one.reference(score, r)
        for name, ours, theirs in zip(expected._fields, found, expected, strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), (r, name)


def check_farthest_first(device: str, n: int, kept: int, values: Values) -> None:
    """The same bits as torch: a distance is one subtraction, and one product with weights."""
    matrix = scores((3, n * n), values, device).view(3, n, n).clamp(-1, 1)  # keeps NaN, as of tokens with NaN
    first, weight = integers((3, 1), 0, n, n, device), draw((3, n), 1, device).abs()
    weight[:, :: max(1, n // 4)] = 0
    for own in (None, weight):
        with poisoned():
            found = picking.farthest_first(matrix, first, kept, own)
        expected = farthest_first.reference(matrix, first, kept, own)
        assert found.dtype == expected.dtype and torch.equal(found, expected)
        assert (found.sort(dim=1).values.diff(dim=1) > 0).all()
        alone = picking.farthest_first(matrix[1:2], first[1:2], kept, None if own is None else own[1:2])
        assert torch.equal(alone, found[1:2])


def check_bound(device: str, n: int) -> None:
    """Beyond the bound no kernel is launched: they are None here, so a launch would fail."""
    launched = selection._place, selection._lowest_into_one
    selection._place = selection._lowest_into_one = None
    try:
        assert n > selection.MOST_TOKENS
        check_place(device, n, "position", "few")
        check_lowest_into_one(device, n, "few")
    finally:
        selection._place, selection._lowest_into_one = launched


def check_bound_of_picks(device: str) -> None:
    """As `check_bound`, with a lower bound, since a matrix beyond the real one is large."""
    launched, most = picking._farthest_first, picking.MOST_TOKENS
    picking._farthest_first, picking.MOST_TOKENS = None, 32
    try:
        check_farthest_first(device, 33, 9, "random")
    finally:
        picking._farthest_first, picking.MOST_TOKENS = launched, most


def check_groups(device: str, n: int, width: int, kept: int, dtype: torch.dtype, layout: Layout) -> None:
    """Sums and means within the error of fp32 sums, exact for small integers; NaN stays in its group."""
    group = integers((2, n), 0, kept, n, device)
    group[:, :kept] = torch.arange(kept, device=device)  # no group is empty
    sizes, weight = integers((2, n), 1, 9, 2, device), draw((2, n), 3, device).abs()
    counts = torch.zeros(2, kept, dtype=torch.int64, device=device).scatter_add_(1, group, torch.ones_like(group))
    x = laid_out(draw((2, n, width), n, device, dtype), layout)
    for own in (None, sizes):
        with poisoned():
            mean, total = groups.group_mean(x, group, kept, own)
        expected, of_group = group_mean.reference(x, group, kept, own)
        assert mean.dtype == torch.float32 and torch.equal(total, of_group)
        torch.testing.assert_close(mean, expected, atol=4e-6, rtol=0)
    for w in (None, weight):
        with poisoned():
            found = groups.group_sum(x, group, counts, w)
        terms = x.double() * (1 if w is None else w.double().unsqueeze(2))
        error = (found - _sums(terms, group, kept)).abs()
        assert (error <= 2e-6 * _sums(terms.abs(), group, kept)).all()
        assert torch.equal(groups.group_sum(x[1:], group[1:], counts[1:], None if w is None else w[1:]), found[1:])
    small = integers((2, n, width), -8, 9, 4, device).to(dtype)
    assert torch.equal(groups.group_sum(small, group, counts), group_sum.reference(small, group, counts))
    small[0, n - 1] = torch.nan
    is_nan = groups.group_sum(small, group, counts).isnan()
    assert is_nan[0, group[0, n - 1]].all() and is_nan.sum() == width


def _sums(values: Tensor, group: Tensor, kept: int) -> Tensor:
    return values.new_zeros(len(values), kept, values.shape[2]).scatter_add_(
        1, group.unsqueeze(2).expand_as(values), values
    )


def check_slots(device: str, count: int, size: int, block_size: int) -> None:
    """Rows of 5 requests, some of which store nothing, and padding."""
    table = integers((6, 40), 0, 1 << 20, 0, device).int()[1:, ::2]  # a slice of a larger table
    request_of, positions = (integers((count,), 0, high, 1, device) for high in (5, 20 * block_size))
    positions[::3] = -7  # any negative one
    with poisoned():
        found = rows.kv_slots(table, request_of, positions, block_size, size)
    expected = kv_slots.reference(table, request_of, positions, block_size, size)
    assert found.dtype == expected.dtype and torch.equal(found, expected)


Method = Literal["folder", "folder_cls", "tome", "turbo", "illava", "divprune"]


def reduction(method: Method, n: int, dtype: torch.dtype, device: str) -> Callable[[], Reduced]:
    """A whole reduction of two images; methods that fold do so several times."""
    x, keys = draw((2, n, 24), n, device, dtype), draw((2, n, 12), 1, device)
    attention, sizes = draw((2, n), 2, device).softmax(dim=-1), integers((2, n), 1, 5, 3, device)
    folds = fold_schedule(n, 2 * n // 3)
    calls: dict[Method, Callable[[], Reduced]] = {
        "folder": lambda: folder(x, folds, scale="official"),
        "folder_cls": lambda: folder_cls(x, keys, attention, folds),
        "tome": lambda: tome(x, keys, sizes, n // 3, class_token=False),
        "turbo": lambda: turbo(x, keys, attention, sizes, n // 3),
        "illava": lambda: illava(x, attention, n // 3),
        "divprune": lambda: divprune(x, n // 3, geometry="centered", rest="merge"),
    }
    return calls[method]


def check_method(device: str, method: Method, n: int, dtype: torch.dtype) -> None:
    """With the kernels of `ops.select_kernels`: the same decisions as torch, the same tokens except for rounding."""
    reduce = reduction(method, n, dtype, device)
    expected = reduce()
    ops.select_kernels(torch.device("cuda"), triton=True)  # in the interpreter too: this process runs checks only
    try:
        with poisoned():
            reduced = reduce()
    finally:
        ops.select_kernels(torch.device("cpu"), triton=False)
    assert reduced.tokens.dtype == dtype
    for ours, theirs in zip(reduced[1:], expected[1:], strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(reduced.tokens, expected.tokens)


def check_wrong_twin(device: str) -> None:
    """Has to fail: without a launch the results are poison."""
    launch, groups._sum_groups = groups._sum_groups, {(3, 1, 2): lambda *args, **options: None}
    try:
        check_groups(device, 5, 4, 3, torch.float32, "contiguous")
    finally:
        groups._sum_groups = launch


def check_refusals(device: str) -> None:
    x = draw((1, 4, 2), 0, device).double()
    for call in (
        lambda: matching.match(x),
        lambda: groups.group_mean(x, torch.zeros(1, 4, dtype=torch.int64, device=device), 1),
        lambda: selection.lowest_into_one(x[..., 0], 1),
        lambda: picking.farthest_first(x @ x.mT, torch.zeros(1, 1, dtype=torch.int64, device=device), 2),
    ):
        with _raises(TypeError, "fp16, bf16 or fp32, not torch.float64"):
            call()
    with _raises(ValueError, "not 1 tokens"):
        matching.match(x[:, :1].float())


@contextmanager
def _raises(error: type[Exception], message: str) -> Iterator[None]:
    try:
        yield
    except error as found:
        assert message in str(found)
    else:
        raise AssertionError(f"no {error.__name__}: {message}")


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

Check = Callable[..., None]
CHECKS: list[tuple[Check, tuple[Any, ...]]] = [
    (check_match, (2, 1, FP32, "random", "contiguous")),
    (check_match, (3, 5, FP32, "random", "sliced")),
    (check_match, (16, 16, BF16, "few", "contiguous")),
    (check_match, (33, 16, FP16, "few", "transposed")),
    (check_match, (130, 16, FP32, "few", "sliced")),  # the last tile of odd tokens has one
    (check_match, (259, 16, BF16, "few", "contiguous")),  # equal ones in several tiles
    (check_match, (64, 72, FP32, "random", "transposed")),
    (check_match, (65, 72, BF16, "random", "sliced")),
    (check_match, (130, 65, FP16, "random", "contiguous")),
    (check_match, (37, 7, FP32, "nan", "contiguous")),
    (check_match, (131, 33, BF16, "nan", "sliced")),
    (check_match, (729, 16, BF16, "few", "contiguous")),
    *(
        (check_place, (n, order, values))
        for order in get_args(Order)
        for n, values in (
            (2, "few"), (3, "few"), (5, "random"), (64, "few"), (65, "nan"), (144, "random"), (577, "few"),
            (1024, "random"),
        )
    ),
    (check_bound, (1025,)),
    (check_bound, (2880,)),
    *(
        (check_lowest_into_one, each)
        for each in (
            (1, "few"), (2, "random"), (3, "few"), (31, "nan"), (32, "random"), (33, "few"), (145, "nan"),
            (1024, "random"),
        )
    ),
    *(
        (check_farthest_first, each)
        for each in (
            (1, 1, "random"), (2, 2, "few"), (3, 2, "random"), (37, 37, "nan"), (64, 20, "few"), (65, 64, "random"),
        )
    ),
    (check_bound_of_picks, ()),
    (check_groups, (1, 1, 1, FP32, "contiguous")),
    (check_groups, (2, 3, 2, BF16, "contiguous")),
    (check_groups, (65, 129, 3, FP32, "sliced")),
    (check_groups, (64, 16, 9, BF16, "transposed")),
    (check_groups, (131, 40, 1, FP16, "sliced")),  # a flat image: all in one
    (check_groups, (300, 257, 2, BF16, "contiguous")),
    *((check_slots, each) for each in ((1, 1, 16), (3, 8, 32), (0, 5, 16), (255, 257, 16), (729, 729, 24))),
    *((check_method, (method, 37, BF16 if method in ("folder", "illava") else FP32)) for method in get_args(Method)),
    (check_refusals, ()),
]  # fmt: skip
"""Checks with their arguments after `device`; some sizes are a multiple of nothing."""


def name_of(check: Check, args: tuple[Any, ...]) -> str:
    return " ".join([check.__name__.removeprefix("check_"), *(str(arg).removeprefix("torch.") for arg in args)])
