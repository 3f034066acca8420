"""Checks of `reducers/evs.py` and `reducers/vidcom2.py`."""

from __future__ import annotations

from foldserve.reducers.evs import change, most_changed
from foldserve.reducers.geometry import VisionGeometry
from foldserve.reducers.plan import InvalidReduction, Reduction, make_plan
from foldserve.reducers.vidcom2 import budgets, likeness, vidcom2, within_budget
from tests.golden.case import Case, Row, assert_equal


def check_evs(case: Case) -> None:
    """The tokens that stay."""
    (x,), golden, params = case.read(case.inputs).values(), case.read(case.outputs), case.params
    score = change(x.view(1, -1, x.shape[-1]), params["frames"])
    assert_equal("indices", most_changed(score, params["n_out"])[0], golden["indices"])


def check_vidcom2(case: Case) -> None:
    """The tokens that stay by the frames' budgets, and those of an exact total."""
    (x,), golden, params = case.read(case.inputs).values(), case.read(case.outputs), case.params
    video = x.view(1, -1, x.shape[-1])
    to_video, to_frame = likeness(video, params["frames"])
    budget = budgets(to_video, params["retention"])
    assert_equal("per_frame_authors", budget[0], golden["per_frame_authors"])
    chosen = within_budget(to_video + to_frame, budget).flatten().nonzero().flatten()
    assert_equal("indices_authors", chosen, golden["indices_authors"])
    served = vidcom2(video, params["frames"], params["n_out"], params["retention"])
    assert_equal("indices", served[0], golden["indices"])


def check_evs_count(row: Row) -> None:
    """Ours is rounded up where theirs is rounded down, and what would be less than a frame is refused."""
    _check_count("evs", row, least=row["tokens_per_frame"])


def check_vidcom2_count(row: Row) -> None:
    """The same with a token for each frame."""
    _check_count("vidcom2", row, least=row["frames"])


def _check_count(method: str, row: Row, least: int) -> None:
    n, rate = row["tokens_per_frame"] * row["frames"], row["pruning_rate"]
    try:
        kept = make_plan(Reduction(method, ratio=rate), VisionGeometry(n, frames=row["frames"])).kept
    except InvalidReduction:
        kept = least
        assert n - int(n * rate) < least
    assert kept - row["kept"] in (0, 1), f"{kept} kept, golden {row['kept']}"
