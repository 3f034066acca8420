"""From a dataclass to a parser, and from what it read to the dataclass."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from foldserve.server.commands.parser import add_options, read_options
from foldserve.server.options import option, positional


def even(text: str) -> int:
    if int(text) % 2:
        raise ValueError("an even number is needed")
    return int(text)


@dataclass(frozen=True, slots=True)
class Cake:
    name: str = positional("NAME", "of the cake")
    folder: Path | None = positional("DIR", default=None)
    layers: int = option(3, "N", "one on the other")
    share: float | None = option(None, "R", "of sugar (default: a pinch)")
    candles: bool = option(True, None, "leave them out")
    nuts: bool = option(False, None, "with them")
    shape: Literal["round", "square"] = option("round", None, "of the tin", group="form")
    sizes: Sequence[float] = option((1.0, 2.5), "S,S,...", "in cm")
    guests: tuple[str, ...] = option((), "WHO", "may come twice", action="append")
    oven_s: int = option(60, "S", flag="--oven", parse=even)
    motto: str = option("eat me", "TEXT", "on top")
    secret: int = 7


def read(*argv: str, **others: Any) -> Cake:
    parser = argparse.ArgumentParser()
    add_options(parser, Cake)
    return read_options(Cake, parser.parse_args(argv), **others)


def test_what_is_not_given_is_left_to_the_dataclass() -> None:
    assert read("a") == Cake("a")
    assert read("a", "--layers", "5", layers=4, motto="now") == Cake("a", layers=5, motto="now")


def test_every_kind_of_field() -> None:
    argv = "a b --layers 2 --share 0.5 --no-candles --nuts --shape square --sizes 1,2 --guests x --guests y --oven 4"
    cake = Cake("a", Path("b"), 2, 0.5, False, True, "square", (1.0, 2.0), ("x", "y"), 4)
    assert read(*argv.split()) == cake


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "the following arguments are required: NAME"),
        ("a --layers x", "argument --layers: invalid int value: 'x'"),
        ("a --shape oval", "argument --shape: invalid choice: 'oval' (choose from 'round', 'square')"),
        ("a --sizes 1;2", "argument --sizes: values with commas between them are needed, not '1;2'"),
        ("a --oven 3", "argument --oven: an even number is needed"),
        ("a --candles", "unrecognized arguments: --candles"),
        ("a --secret 3", "unrecognized arguments: --secret 3"),
    ],
)
def test_what_cannot_be_read(argv: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read(*argv.split())
    assert message in capsys.readouterr().err


def test_help_shows_defaults_and_groups() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, Cake)
    before, form = " ".join(parser.format_help().split()).split(" form: ")
    assert "NAME of the cake DIR options:" in before
    assert "--layers N one on the other (default: 3) --share R of sugar (default: a pinch)" in before
    assert before.endswith("--no-candles leave them out --nuts with them")
    assert "--shape {round,square} of the tin (default: round) --sizes S,S,... in cm (default: 1,2.5)" in form
    assert form.endswith('--oven S (default: 60) --motto TEXT on top (default: "eat me")')
