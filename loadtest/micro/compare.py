"""Compares two results: `python -m foldserve.loadtest.micro.compare base.json head.json`.

Takes the --json files of the benchmarks, or report.json of `foldserve loadtest`. Numbers are paired by their path, and
entries of lists by their texts (method, label, part, ...), so their order does not matter.
"""

from __future__ import annotations

import json
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BOUNDS = ("low", "high")


@dataclass(frozen=True, slots=True)
class Figure:
    """A number and its interval, if it has one."""

    value: float
    low: float | None = None
    high: float | None = None

    def differs_from(self, other: Figure) -> bool | None:
        """Whether the intervals are disjoint; None if one is missing."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return None
        return self.low > other.high or other.low > self.high


@dataclass(frozen=True, slots=True)
class Change:
    """One number in both files."""

    name: str
    base: Figure
    head: Figure

    @property
    def ratio(self) -> float:
        return self.head.value / self.base.value if self.base.value else float("nan")


def figures(node: Any, path: str = "") -> Iterator[tuple[str, Figure]]:
    """Every number of a JSON value with its path; `{"value", "low", "high"}` is one number."""
    if isinstance(node, dict) and "value" in node:
        yield path, Figure(node["value"], *(node.get(bound) for bound in _BOUNDS))
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from figures(value, f"{path}/{key}" if path else key)
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from figures(value, f"{path}[{_name(value) or number}]")
    elif isinstance(node, int | float) and not isinstance(node, bool):
        yield path, Figure(node)


def compare(base: Any, head: Any) -> list[Change]:
    """The numbers that both have, in the order of `base`; ValueError if there is none."""
    new = dict(figures(head))
    found = [Change(name, figure, new[name]) for name, figure in figures(base) if name in new]
    if not found:
        raise ValueError("the two results have no number in common: are they of the same benchmark?")
    return found


def _name(entry: Any) -> str:
    """Texts and identifying numbers of an entry and its children, which tell it from others."""
    if not isinstance(entry, dict):
        return ""
    texts = [str(value) for value in entry.values() if isinstance(value, str)]
    for value in entry.values():
        if isinstance(value, dict) and "value" not in value:
            texts += [f"{k}={v}" for k, v in value.items() if isinstance(v, str | int | float) and k in _IDENTIFYING]
    texts += [f"{key}={entry[key]}" for key in _IDENTIFYING if isinstance(entry.get(key), int | float)]
    return " ".join(texts)


_IDENTIFYING = ("ratio", "concurrency", "rate", "speed", "tokens", "kept", "batch")


def render(changes: Sequence[Change], threshold: float) -> list[str]:
    """Lines of a Markdown table of changes above `threshold`, a share."""
    lines = ["| figure | base | head | head / base | intervals apart |", "|---|---|---|---|---|"]
    words = {True: "yes", False: "no", None: ""}
    for change in changes:
        if not abs(change.ratio - 1) <= threshold and change.base.value != change.head.value:
            apart = words[change.base.differs_from(change.head)]
            numbers = f"{change.base.value:.6g} | {change.head.value:.6g} | {change.ratio:.3f}"
            lines.append(f"| {change.name} | {numbers} | {apart} |")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("head", type=Path)
    parser.add_argument("--threshold", type=float, default=0.02, metavar="SHARE", help="smaller changes are not shown")
    args = parser.parse_args(argv)
    try:
        changes = compare(json.loads(args.base.read_text()), json.loads(args.head.read_text()))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    lines = render(changes, args.threshold)
    print("\n".join(lines))
    print(f"\n{len(changes)} figures in both, {len(lines) - 2} changed by more than {args.threshold:.0%}")


if __name__ == "__main__":
    main()
