"""Checks of `reducers/mmtok.py`."""

from __future__ import annotations

from foldserve.reducers.mmtok import coverage, keywords, most_covering
from tests.golden.case import Case, Row, assert_equal


def check_mmtok(case: Case) -> None:
    """The tokens kept of one image."""
    case.require(order="position")
    inputs, golden, params = case.read(case.inputs), case.read(case.outputs), case.params
    covers = coverage(
        inputs["projected"],
        inputs["tower"],
        inputs["text"],
        text_temperature=params["text_temperature"],
        vision_temperature=params["vision_temperature"],
        alpha=params["alpha"],
    )
    (picked,) = most_covering(covers[None], params["kept"], params["exclude"])
    assert_equal("indices", picked, golden["indices"])


def check_mmtok_keywords(row: Row) -> None:
    """What is left of a question."""
    assert_equal("keywords", keywords(row["text"]), row["keywords"])
