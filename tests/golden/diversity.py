"""Checks of `reducers/divprune.py` and `reducers/cdpruner.py`; CDPruner's relevance of the text is implemented here."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from foldserve.reducers.cdpruner import cdpruner, largest_volume
from foldserve.reducers.divprune import divprune, farthest
from foldserve.reducers.fold import unit_rows
from tests.golden.case import Case, assert_close, assert_equal


def check_divprune(case: Case) -> None:
    case.require(order="position", geometry="raw")
    inputs, golden, kept = case.read(case.inputs), case.read(case.outputs), case.params["kept"]
    reduced = divprune(inputs["x"], kept)
    assert_equal("order", farthest(unit_rows(inputs["x"]), kept), golden["order"])
    assert_equal("indices", reduced.source, golden["indices"])
    if "features" in golden:
        assert_close("features", reduced.tokens, golden["features"])


def check_centered(case: Case) -> None:
    """Both forms are ours by name: what one standardizes it weighs by a sigmoid."""
    forms = {(False, "minmax"): "centered", (True, "sigmoid"): "standardized"}
    case.require(order="position", geometry="centered", eps=1e-6)
    geometry = forms[case.params["standardize"], case.params["weight"]]
    inputs, golden = case.read(case.inputs), case.read(case.outputs)
    reduced = divprune(inputs["x"], case.params["kept"], geometry=geometry)  # type: ignore[arg-type]
    assert_equal("indices", reduced.source, golden["indices"])


def check_cdpruner(case: Case) -> None:
    case.require(order="position")
    inputs, golden, kept = case.read(case.inputs), case.read(case.outputs), case.params["kept"]
    relevance = of_text(inputs["image_embeds"], inputs["text_embeds"])
    reduced = cdpruner(inputs["features"], kept, relevance=relevance)
    assert_equal("order", largest_volume(unit_rows(inputs["features"]), kept, relevance), golden["order"])
    assert_equal("indices", reduced.source, golden["indices"])


def of_text(patches: Tensor, texts: Tensor) -> Tensor:
    """(tiles, n, c), (segments, c) -> (tiles, n), from the least to the most relevant of all tiles of an image."""
    unlike = -(F.normalize(patches, dim=-1) @ F.normalize(texts, dim=-1).mT).mean(dim=-1)
    low, high = unlike.aminmax()
    return torch.ones_like(unlike) if high - low < 1e-12 else (unlike - low + 1e-6) / (high - low)
