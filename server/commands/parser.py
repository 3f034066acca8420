"""Command parsers built from dataclasses, whose fields are declared with `option` and `positional`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from foldserve.server.options import flag

_T = TypeVar("_T")

_ARGPARSE = ("action", "choices", "metavar", "nargs")  # metadata passed to argparse unchanged


def declare(
    parser: argparse.ArgumentParser,
    options: type[_T],
    run: Callable[[_T, list[str]], None],
    description: str | None = None,
    *,
    takes_engine_options: bool = False,
    defaults: Callable[[argparse.Namespace], Mapping[str, Any]] = lambda args: {},
) -> None:
    """Declares a command on its parser.

    Args:
        run: gets the options, and vLLM's arguments; raises ValueError for bad ones.
        defaults: values for options that were not given (None here), which go before the dataclass's defaults.
    """
    describe(parser, description)
    add_options(parser, options)

    def read_and_run(args: argparse.Namespace, rest: list[str]) -> None:
        try:
            run(read_options(options, args, **defaults(args)), rest)
        except (ValueError, FileExistsError) as error:
            parser.error(str(error))

    parser.set_defaults(run=read_and_run, takes_engine_options=takes_engine_options)


def describe(parser: argparse.ArgumentParser, description: str | None) -> None:
    parser.description, parser.formatter_class = description, argparse.RawDescriptionHelpFormatter
    parser.allow_abbrev = False


def add_options(parser: argparse._ActionsContainer, options: type, only: Sequence[str] | None = None) -> None:
    """Declares a dataclass's fields that are options, or some of them; its defaults apply to those not given."""
    types = get_type_hints(options)
    group = parser
    for field in _options(options):
        if only is not None and field.name not in only:
            continue
        if title := field.metadata.get("group"):
            group = parser.add_argument_group(title)
        keywords = _keywords(field, types[field.name])
        if field.metadata.get("positional"):
            group.add_argument(field.name, **keywords)
        else:
            prefix = "no_" if field.default is True else ""
            name = field.metadata.get("flag") or flag(prefix + field.name)
            short = [field.metadata["short"]] if "short" in field.metadata else []
            group.add_argument(*short, name, dest=field.name, **keywords)


def read_options(options: type[_T], args: argparse.Namespace, **others: Any) -> _T:
    """The dataclass made of the given options, with `others` for those not given; raises the dataclass's ValueError."""
    found = {field.name: getattr(args, field.name) for field in _options(options)}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items() if v is not None}
    return options(**others | given)


def argument(parse: Callable[[str], _T]) -> Callable[[str], _T]:
    """Wraps `parse` so that argparse shows the message of its ValueError."""

    def parse_argument(text: str) -> _T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse_argument


def _options(options: type) -> list[Field[Any]]:
    return [field for field in fields(options) if "help" in field.metadata]


def _keywords(field: Field[Any], kind: Any) -> dict[str, Any]:
    metadata = field.metadata
    found = {"default": None, "help": _help(field), **_reader(kind, field)}
    found |= {key: metadata[key] for key in _ARGPARSE if metadata.get(key) is not None}
    if metadata.get("positional") and field.default is not MISSING:
        found["nargs"] = "?"
    return found


def _help(field: Field[Any]) -> str:
    help: str = field.metadata["help"]
    default = field.default
    if default is MISSING or default is None or default == () or isinstance(default, bool) or "(default:" in help:
        return help
    text = ",".join(map(_text, default)) if isinstance(default, tuple) else _text(default)
    return f"{help} (default: {text})".lstrip()


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return f'"{value}"' if isinstance(value, str) and " " in value else str(value)


def _reader(kind: Any, field: Field[Any]) -> dict[str, Any]:
    """How argparse reads a value of a type. Items of a list are separated by commas, or are words of their own."""
    metadata = field.metadata
    if parse := metadata.get("parse"):
        return {"type": argument(parse)}
    if NoneType in get_args(kind):
        kind = next(member for member in get_args(kind) if member is not NoneType)
    if get_origin(kind) in (tuple, Sequence):
        kind = get_args(kind)[0]
        if not {"action", "nargs"} & metadata.keys():
            return {"type": argument(_each(kind, metadata.get("expected", "values with commas between them")))}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if kind is bool:
        return {"action": "store_false" if field.default else "store_true"}
    return {"type": kind}


def _each(kind: Callable[[str], _T], expected: str) -> Callable[[str], tuple[_T, ...]]:
    def parse(text: str) -> tuple[_T, ...]:
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError as error:
            raise ValueError(f"{expected} are needed, not {text!r}") from error

    return parse
