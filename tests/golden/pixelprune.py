"""Checks of `reducers/pixelprune.py`."""

from __future__ import annotations

from math import floor

from torch import Tensor

from foldserve.reducers.pixelprune import Prediction, predict
from tests.golden.case import Case, assert_equal


def check_pixelprune(case: Case) -> None:
    """Cells as they are; of the authors' measures the largest difference, and equality, which is one of 0."""
    if case.params["metric"] != "exact":
        case.require(metric="max")
    params = case.params
    cells = case.read(case.inputs)["cells"]
    _check(case, cells.view(params["rows"], params["columns"], params["dim"]))


def check_pixelprune_image(case: Case) -> None:
    """The cells of an image, (height, width, 3)."""
    side, image = case.params["cell"], case.read(case.inputs)["image"]
    assert_equal("largest difference", floor(255 * case.params["tau"]), case.params["largest_difference"])
    _check(case, image.unfold(0, side, side).unfold(1, side, side).flatten(2))


def _check(case: Case, cells: Tensor) -> None:
    prediction: Prediction = "anchored" if case.params["anchored"] else "sliding"
    stays = predict(cells, floor(255 * case.params["tau"]), prediction).stays
    assert_equal("indices", stays.flatten().nonzero().flatten(), case.read(case.outputs)["indices"].long())
