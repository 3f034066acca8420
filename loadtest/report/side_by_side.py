"""Compares two reports: differences and ratios of their figures, with intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, hypot, log

from foldserve.loadtest.report.estimates import Estimate
from foldserve.loadtest.report.tables import NONE, Table

Pair = tuple[Estimate | None, Estimate | None]

NOTE = (
    "Intervals of differences and ratios come from those of both sides (MOVER; for shares it is Newcombe's method 10), "
    "as if the sides were independent. 'yes': equality lies outside the interval."
)


@dataclass(frozen=True, slots=True)
class Measure:
    """One figure of both sides.

    Attributes:
        as_ratio: compare as second / first, else as second - first.
        scale, digits: factor and decimal places of the values shown; a ratio has two.
    """

    name: str
    digits: int = 2
    scale: float = 1
    as_ratio: bool = False


def difference(first: Estimate, second: Estimate) -> Estimate:
    """second - first, with the interval of MOVER (Donner and Zou 2012)."""
    value = second.value - first.value
    low = value - hypot(second.value - second.low, first.high - first.value)
    high = value + hypot(second.high - second.value, first.value - first.low)
    return Estimate(value, low, high)


def ratio(first: Estimate, second: Estimate) -> Estimate | None:
    """second / first, from the difference of logarithms; None if a value or end is not above 0."""
    if min(value for each in (first, second) for value in (each.value, each.low, each.high)) <= 0:
        return None
    found = difference(_log(first), _log(second))
    return Estimate(exp(found.value), exp(found.low), exp(found.high))


def differences(
    keys: Sequence[str],
    measures: Sequence[Measure],
    rows: Iterable[tuple[Sequence[str], Sequence[Pair]]],
    names: Sequence[str],
    note: str = NOTE,
) -> Table:
    """Table of the rows that both sides have.

    Args:
        keys: headings of the columns that name a row.
        rows: (names of the row, a pair for each measure).
        names: of the two sides.
    """
    headings = [*keys]
    for measure in measures:
        word = "ratio" if measure.as_ratio else "difference"
        headings += [*(f"{measure.name}, {name}" for name in names), word, "differs"]
    cells = [
        [*key, *(cell for pair in zip(measures, pairs, strict=True) for cell in _cells(*pair))] for key, pairs in rows
    ]
    return Table("Differences", headings, cells, labels=len(keys), key=len(keys), note=note)


def settings(first: Mapping[str, str], second: Mapping[str, str], names: Sequence[str]) -> Table:
    """Table of both sides' settings, those that differ first."""
    keys = sorted(dict.fromkeys([*first, *second]), key=lambda key: first.get(key) == second.get(key))
    cells = [[key, first.get(key, NONE), second.get(key, NONE)] for key in keys]
    return Table("How they were measured", ["", *names], cells, labels=3, is_prose=True)


def _cells(measure: Measure, pair: Pair) -> list[str]:
    first, second = pair
    shown = [NONE if each is None else _show(each, measure.digits, measure.scale) for each in pair]
    if first is None or second is None:
        return [*shown, NONE, NONE]
    if measure.as_ratio:
        found, same, text = ratio(first, second), 1.0, (2, 1.0)
    else:
        found, same, text = difference(first, second), 0.0, (measure.digits, measure.scale)
    if found is None:
        return [*shown, NONE, NONE]
    differs = "yes" if found.low > same or found.high < same else NONE
    has_interval = found.low < found.high
    return [*shown, _show(found, *text), differs if has_interval else NONE]


def _show(each: Estimate, digits: int, scale: float) -> str:
    return each.show(digits, scale) if each.low < each.high else f"{scale * each.value:.{digits}f}"


def _log(each: Estimate) -> Estimate:
    return Estimate(log(each.value), log(each.low), log(each.high))
