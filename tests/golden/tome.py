"""Checks of `reducers/tome.py`."""

from __future__ import annotations

from foldserve.reducers.fold import Reduced
from foldserve.reducers.schedule import even_schedule
from foldserve.reducers.tome import tome, turbo
from tests.golden.case import Case, Row, Unsupported, assert_close, assert_equal
from tests.golden.folder import assert_refused


def check_tome(case: Case) -> None:
    """One step; where the authors' code merges as many as it can, we refuse."""
    case.require(order="unmerged_even_then_odd")
    inputs, params = case.read(case.inputs), case.params

    def merge(r: int) -> Reduced:
        sizes = inputs["size"].squeeze(-1).long()
        return tome(inputs["x"], inputs["key"], sizes, r, class_token=params["class_token"])

    if params["r"] > params["r_effective"]:
        assert_refused(lambda: merge(params["r"]))
    _check(case, merge(params["r_effective"]))


def check_turbo(case: Case) -> None:
    """One step with the class token's attention."""
    case.require(order="unmerged_even_then_odd", class_token=True, attn_weight=30 * case.params["alpha"])
    inputs, params = case.read(case.inputs), case.params
    sizes = inputs["size"].squeeze(-1).long()
    _check(case, turbo(inputs["x"], inputs["key"], inputs["attn_cls"], sizes, params["r"], alpha=params["alpha"]))


def check_tome_schedule(row: Row) -> None:
    """num_layers, r -> schedule; of the authors' schedules the even one."""
    r, inflection = row["r"] if isinstance(row["r"], list) else (row["r"], 0)
    if inflection:
        raise Unsupported(f"a schedule with inflection {inflection}: the tokens to remove are spread evenly")
    schedule = even_schedule(r * row["num_layers"], row["num_layers"])
    assert_equal(f"schedule of {row}", list(schedule), row["schedule"])


def _check(case: Case, reduced: Reduced) -> None:
    golden = case.read(case.outputs)
    assert_close("features", reduced.tokens, golden["features"])
    assert_equal("size", reduced.sizes, golden["size"].squeeze(-1).long())
