"""Checks of `reducers/folder.py` and of the counts in `reducers/plan.py`."""

from __future__ import annotations

from collections.abc import Callable

from foldserve.reducers.fold import group_sum
from foldserve.reducers.folder import folder, folder_cls
from foldserve.reducers.plan import Reduction, VisionGeometry, fold_schedule, make_plan
from tests.golden.case import Case, Row, assert_close, assert_equal


def check_folder(case: Case) -> None:
    """Features with and without the authors' scale, sizes, and the metric carried along."""
    case.require(order="position")
    n, r, unmet = case.params["n"], case.params["r"], case.params["r_unmet"]
    if unmet:
        assert_refused(lambda: fold_schedule(n, r))
    folds = fold_schedule(n, r - unmet)
    assert_equal("fold_schedule", list(folds), case.params["fold_schedule"])

    inputs, golden = case.read(case.inputs), case.read(case.outputs)
    x, metric, class_token = inputs["x"], inputs.get("metric"), case.params["class_token"]
    # what we refuse, the authors' code does as far as it can, and then leaves unscaled
    reduced = folder(x, folds, metric=metric, scale="none" if unmet else "official", class_token=class_token)
    assert_close("features", reduced.tokens, golden["features"])
    assert_equal("size", reduced.sizes, golden["size"].squeeze(-1).long())
    if "features_unscaled" in golden:
        plain = folder(x, folds, metric=metric, class_token=class_token)
        assert_close("features_unscaled", plain.tokens, golden["features_unscaled"])
    if metric is not None:
        carried = group_sum(metric, reduced.group, reduced.sizes) / reduced.sizes.unsqueeze(-1)
        assert_close("metric", carried, golden["metric"])


def check_folder_cls(case: Case) -> None:
    """Features and sizes; the authors' code still carries the class token here, ours drops it."""
    case.require(order="unmerged_even_then_odd", attn_cls_merge="mean_unweighted", class_token=True, r_threshold=0)
    folds = fold_schedule(case.params["n"], case.params["r"])
    assert_equal("fold_schedule", list(folds), case.params["fold_schedule"])

    inputs, golden = case.read(case.inputs), case.read(case.outputs)
    x, weight = inputs["x"], case.params["attn_weight"]
    reduced = folder_cls(x, inputs["key"], inputs["attn_cls"], folds, attention_weight=weight)
    assert_close("features", reduced.tokens, golden["features"])
    assert_equal("size", reduced.sizes, golden["size"].squeeze(-1).long())


def check_fold_schedule(row: Row) -> None:
    """n, r -> folds, n_out; where the authors' code stops at two tokens, we refuse."""
    n, r, n_out = row["n"], row["r"], row["n_out"]
    assert_equal(f"folds of {row}", list(fold_schedule(n, n - n_out)), row["folds"])
    if r > n - n_out:
        assert_refused(lambda: fold_schedule(n, r))


def check_ratio(row: Row) -> None:
    """n, ratio -> r, kept, for both of FOLDER; fewer than two kept tokens are refused."""
    geometry = VisionGeometry(row["n"], layers=23, class_token=True)
    for method in ("folder", "folder_cls"):
        reduction = Reduction(method, ratio=row["ratio"])
        if row["kept"] < 2:
            assert_refused(lambda asked=reduction: make_plan(asked, geometry))  # type: ignore[misc]
        else:
            plan = make_plan(reduction, geometry)
            assert_equal(f"{method} of {row}", (plan.removed, plan.kept), (row["r"], row["kept"]))
            assert_equal(f"{method}: sum of folds", sum(plan.folds), row["r"])


def assert_refused(count: Callable[[], object]) -> None:
    """The call raises ValueError."""
    try:
        result = count()
    except ValueError:
        return
    raise AssertionError(f"not refused, gave {result}")
