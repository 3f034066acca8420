"""Reads accuracy from the card of `foldserve evaluate`, to show beside throughput."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from foldserve.loadtest.report.estimates import Estimate


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Share of right answers; `family` is as in `Variant.family`."""

    family: str
    ratio: float
    share: Estimate


def read_accuracy(file: Path) -> list[Accuracy]:
    """Accuracy of all results with a ratio, and for each family at ratio 0; ValueError if `file` is no card."""
    try:
        results = json.loads(file.read_text())["results"]
        full = _share(results[0]["accuracy"])
        found = [_accuracy(result) for result in results[1:] if result["accuracy"] and result["ratio"] is not None]
    except (OSError, KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is no quality.json of `foldserve evaluate`: {error}") from error
    families = dict.fromkeys(each.family for each in found)
    return [*(Accuracy(family, 0.0, full) for family in families), *found]


def _accuracy(result: dict[str, object]) -> Accuracy:
    family = str(result["label"]).replace("+", " + ")
    return Accuracy(family, float(str(result["ratio"])), _share(result["accuracy"]))


def _share(fields: object) -> Estimate:
    assert isinstance(fields, dict)
    return Estimate(fields["value"], fields["low"], fields["high"])
