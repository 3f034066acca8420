"""Nested counted repetition in regular expressions, schemas and grammars: short to write, expensive to match.

`((a{0,200}){0,200}){0,200}` has 26 characters and eight million ways to match. The engine bounds the time that such a
form takes; here forms are refused that the text alone gives away. All of it is linear in the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from foldserve.server.api.errors import LimitExceeded
from foldserve.server.api.limits.strict_json import Path, to_text

_DEEPEST, _MOST = 2, 1000
_HUGE = 10**9

_TIMES = r"\{(?P<least>\d+)(?P<comma>,(?P<most>\d*))?\}"
_CLASS = r"\[\^?\]?(?:\\.|[^\]\\])*(?:\]|\Z)"  # an unclosed class goes to the end: looked for once
_REGEX = re.compile(rf"(?P<open>\()|(?P<close>\))|{_TIMES}|(?P<atom>\\.|{_CLASS}|.)", re.DOTALL)


def _grammar(brackets: str, opening: str, closing: str) -> re.Pattern[str]:
    text = r""""(?:\\.|[^"\\\n])*(?:"|(?=\n)|\Z)|'(?:\\.|[^'\\\n])*(?:'|(?=\n)|\Z)"""
    return re.compile(
        rf"(?P<skip>\s+|#[^\n]*|//[^\n]*)|(?P<open>{opening})|(?P<close>{closing})|{_TIMES}"
        r"|~\s*(?P<lark_least>\d+)(?:\s*\.\.\s*(?P<lark_most>\d+))?"
        r"|(?P<rule>[A-Za-z_?!][\w.-]*)(?=\s*(?:::=|:(?!:)))|(?P<name>[A-Za-z_][\w-]*)"
        rf"|(?P<literal>/(?:\\.|[^/\\\n])+(?:/|(?=\n)|\Z))|(?P<atom>{brackets}{text}|.)",
        re.DOTALL,
    )


_EBNF = _grammar(f"{_CLASS}|", r"\(", r"\)")
_LARK = _grammar("", r"[(\[]", r"[)\]]")  # brackets are an optional group in Lark


class Nested(NamedTuple):
    """Deepest nesting of counted repetitions, and the largest product of their bounds."""

    depth: int = 0
    product: int = 1

    def with_(self, other: Nested) -> Nested:
        return Nested(max(self.depth, other.depth), max(self.product, other.product))

    def times(self, bound: int) -> Nested:
        return self if bound < 2 else Nested(self.depth + 1, min(self.product * bound, _HUGE))


_Item = tuple[str, object]  # "open", "close", "times" and a bound, "atom" and what is nested in it, "name" of a rule


def check_repetition(form: object, path: Path) -> None:
    """Refuses forms of answers in which counted repetitions are nested too far.

    `form` is the `response_format`, `structured_outputs` or `tools` of a request, at `path`. Raises LimitExceeded with
    the path of the text as `param`.
    """
    for text, is_grammar, where in _texts(form, path):
        found = of_grammar(text) if is_grammar else of_regex(text)
        if found.depth > _DEEPEST or (found.depth > 1 and found.product > _MOST):
            raise LimitExceeded(
                f"counted repetitions may be nested {_DEEPEST} deep, and their bounds may multiply to {_MOST}: bound "
                "the inner or the outer one lower, or use * or + for one of them",
                to_text(where),
            )


def of_regex(text: str) -> Nested:
    return _evaluate(_items(_REGEX, text), {})


def of_grammar(text: str) -> Nested:
    """Of a grammar in EBNF or Lark's form, through its rules; a recursive rule counts once."""
    rules: dict[str, list[_Item]] = {"": []}
    current = rules[""]
    for kind, value in _items(_EBNF if "::=" in text else _LARK, text):
        if kind == "rule":
            current = rules.setdefault(str(value).lstrip("?!").partition(".")[0], [])
        else:
            current.append((kind, value))
    known: dict[str, Nested] = {}
    for start in rules:
        _follow(start, rules, known)
    total = Nested()
    for found in known.values():
        total = total.with_(found)
    return total


def _follow(start: str, rules: Mapping[str, list[_Item]], known: dict[str, Nested]) -> None:
    """Adds a rule to `known`, after all rules that it leads to."""
    begun = {start}
    stack = [(start, _references(rules[start], rules))] if start not in known else []
    while stack:
        name, references = stack[-1]
        following = next((r for r in references if r not in known and r not in begun), None)
        if following is None:
            known[name] = _evaluate(iter(rules[name]), known)
            stack.pop()
        else:
            begun.add(following)
            stack.append((following, _references(rules[following], rules)))


def _references(items: list[_Item], rules: Mapping[str, object]) -> Iterator[str]:
    return (str(value) for kind, value in items if kind == "name" and value in rules)


def _evaluate(items: Iterator[_Item], rules: Mapping[str, Nested]) -> Nested:
    outer: list[Nested] = []  # for each open group, what came before it
    whole, last = Nested(), Nested()
    for kind, value in items:
        if kind == "open":
            outer.append(whole)
            whole = last = Nested()
        elif kind == "close":
            last, whole = whole, outer.pop() if outer else Nested()
            whole = whole.with_(last)
        elif kind == "times":
            assert isinstance(value, int)
            last = last.times(value)
            whole = whole.with_(last)
        else:
            last = value if isinstance(value, Nested) else rules.get(str(value), Nested())
            whole = whole.with_(last)
    for before in outer:  # never closed: the engine will refuse it
        whole = whole.with_(before)
    return whole


def _items(dialect: re.Pattern[str], text: str) -> Iterator[_Item]:
    for match in dialect.finditer(text):
        kind = match.lastgroup or "skip"
        if kind == "atom":
            yield kind, Nested()
        elif kind in ("open", "close", "rule", "name"):
            yield kind, match[kind]
        elif kind == "literal":
            yield "atom", of_regex(match[kind].strip("/"))
        elif kind != "skip":
            groups = match.groupdict()
            least, most = (groups[name] or groups.get(f"lark_{name}") or "0" for name in ("least", "most"))
            yield "times", max(_number(least), _number(most))


def _number(digits: str) -> int:
    return int(digits) if len(digits) < 10 else _HUGE


def _texts(form: object, path: Path) -> Iterator[tuple[str, bool, Path]]:
    """Every regular expression (False) and grammar (True) in a form, with its path."""
    left: list[tuple[object, Path]] = [(form, path)]
    while left:
        value, where = left.pop()
        if isinstance(value, list):
            left += [(item, (where, i)) for i, item in enumerate(value)]
        elif isinstance(value, dict):
            for key, inner in value.items():
                if isinstance(inner, str):
                    if key in ("regex", "pattern", "grammar"):
                        yield inner, key == "grammar", (where, key)
                    elif key in ("json", "schema"):
                        left.append((_parsed(inner), (where, key)))
                    continue
                if key == "patternProperties" and isinstance(inner, dict):
                    yield from ((pattern, False, (where, key)) for pattern in inner)
                left.append((inner, (where, key)))


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None  # the engine refuses it
