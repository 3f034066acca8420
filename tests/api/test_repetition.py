"""Nested counted repetition is recognised in the text of a grammar, however it is written."""

from __future__ import annotations

import gc
import json
import time
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foldserve.server.api.errors import LimitExceeded
from foldserve.server.api.limits.body import check_body
from foldserve.server.api.limits.repetition import Nested, check_repetition, of_grammar, of_regex
from foldserve.server.limits import Limits

DEAR = "((a{0,200}){0,200}){0,200}"
REFUSED: dict[str, dict[str, Any]] = {
    "regex": {"structured_outputs": {"regex": DEAR}},
    "two levels": {"structured_outputs": {"regex": "(.{0,1000}){0,1000}"}},
    "three small ones": {"structured_outputs": {"regex": "((a{2}){2}){2}"}},
    "at least": {"structured_outputs": {"regex": "(x(ab{50,}c){9}y){3}"}},
    "without capture": {"structured_outputs": {"regex": "(?:(?:a{99}|b){2,99})?"}},
    "ebnf": {"structured_outputs": {"grammar": 'root ::= (("a"{1,300}){1,300}){1,300}'}},
    "rules": {"structured_outputs": {"grammar": 'root ::= x{0,200}\nx ::= y{0,200}\ny ::= "a"{0,200}'}},
    "rules, forward and back": {
        "structured_outputs": {"grammar": 'y ::= "a"{0,99}\nroot ::= (y | z){0,99}\nz ::= root | y'}
    },
    "lark": {"structured_outputs": {"grammar": 'start: (("a"~0..200)~0..200)~0..200'}},
    "lark, rules": {"structured_outputs": {"grammar": "?start.2: x~2..99\nx: /a{99}/"}},
    "lark, optional": {"structured_outputs": {"grammar": 'start: [["a"~0..200]~0..200]~0..200'}},
    "schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"pattern": DEAR}}}},
    "schema, deep": {
        "structured_outputs": {"json": {"properties": {"a": {"items": [{"anyOf": [{"pattern": DEAR}]}]}}}}
    },
    "schema, names": {"structured_outputs": {"json": {"patternProperties": {DEAR: {"type": "string"}}}}},
    "schema as text": {"structured_outputs": {"json": json.dumps({"pattern": DEAR})}},
    "tool": {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"pattern": DEAR}}}]},
    "structural tag": {"response_format": {"type": "structural_tag", "format": {"type": "regex", "pattern": DEAR}}},
    "huge bounds": {"structured_outputs": {"regex": f"(a{{{'9' * 5000}}}){{2}}"}},
}
TAKEN: dict[str, dict[str, Any]] = {
    "address": {"structured_outputs": {"regex": r"([0-9]{1,3}\.){3}[0-9]{1,3}"}},
    "one large": {"structured_outputs": {"regex": "[a-z]{1,100000}( [a-z]{0,5000})*"}},
    "in a row": {"structured_outputs": {"regex": "(a{0,200})(b{0,200})(c{0,200})"}},
    "escaped": {"structured_outputs": {"regex": r"((a\{0,200\}){0,9}[({0,200}]){0,9}"}},
    "domain": {"structured_outputs": {"json": {"pattern": r"^(?:[a-z0-9-]{1,63}\.){1,8}[a-z]{2,24}$"}}},
    "quoted": {"structured_outputs": {"grammar": 'root ::= "(({0,200}){0,200}" x{0,200}\nx ::= [({0,200})] | "a"'}},
    "recursive": {"structured_outputs": {"grammar": 'root ::= "(" root{0,30} ")" | "a"'}},
    "no text": {"structured_outputs": {"json": {"properties": {"pattern": {"type": "string"}}}}},
    "none": {"response_format": None},
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    with pytest.raises(LimitExceeded, match="nested 2 deep, and their bounds may multiply to 1000") as caught:
        check_body(REFUSED[name], Limits())
    (field,) = REFUSED[name]
    assert str(caught.value.param).startswith(field)


@pytest.mark.parametrize("name", TAKEN)
def test_taken(name: str) -> None:
    check_body(TAKEN[name], Limits())


def expressions(depth: int = 3) -> st.SearchStrategy[tuple[str, Nested]]:
    """A regular expression, with what is nested in it by construction."""
    atom = st.sampled_from(["a", r"\(", r"\{2,3\}", "[(]", "[^)]", "[]{2,9}]", "."]).map(lambda text: (text, Nested()))

    def extend(inner: st.SearchStrategy[tuple[str, Nested]]) -> st.SearchStrategy[tuple[str, Nested]]:
        counted = st.tuples(inner, st.integers(0, 30), st.integers(0, 30), st.booleans()).map(repeat)
        row = st.lists(inner, min_size=1, max_size=3).map(join)
        return counted | row | inner.map(lambda item: (f"({item[0]})*", item[1]))

    return st.recursive(atom, extend, max_leaves=8)


def repeat(drawn: tuple[tuple[str, Nested], int, int, bool]) -> tuple[str, Nested]:
    (text, nested), least, more, is_open = drawn
    bound = least if is_open else least + more
    return f"({text}){{{least},{'' if is_open else least + more}}}", nested.times(bound)


def join(items: list[tuple[str, Nested]]) -> tuple[str, Nested]:
    nested = Nested()
    for _, inner in items:
        nested = nested.with_(inner)
    return "(" + "|".join(text for text, _ in items) + ")", nested


@given(expressions())
def test_any_expression(drawn: tuple[str, Nested]) -> None:
    text, nested = drawn
    assert of_regex(text) == nested


@given(st.text(alphabet='(){}[]\\"/~|,:=.0123456789ab \n', max_size=60))
def test_any_text_has_an_answer(text: str) -> None:
    of_regex(text)
    of_grammar(text)


@pytest.mark.parametrize(
    "make",
    [
        lambda n: "(" * n,
        lambda n: "((a{0,2})" * n,
        lambda n: "a{0,2}" * n,
        lambda n: "[" * n,
        lambda n: '"' * n,
        lambda n: "\n".join(f"r{i} ::= r{i + 1} r{i + 1}" for i in range(n)),
        lambda n: "\n".join(f"r{i} ::= r{i - 1}{{0,2}}" for i in range(n)),
        lambda n: "/" * n,
        lambda n: "{1" * n,
        lambda n: "~1 " * n,
    ],
    ids=range(10),
)
@pytest.mark.parametrize("form", ["regex", "grammar"])
def test_the_check_is_linear_in_the_text(make: Any, form: str) -> None:
    """Four times the text takes at most six times as long; the least of up to twenty turns, of CPU time."""

    def seconds(text: str) -> float:
        gc.disable()  # which looks through what other tests have left in this process, the more the longer the text is
        began = time.thread_time()
        with suppress(LimitExceeded):
            check_repetition({form: text}, (None, "structured_outputs"))
        took = time.thread_time() - began
        gc.enable()
        return took

    short, long = make(2000), make(8000)
    of_short, of_long = seconds(short), seconds(long)
    for _ in range(20):  # side by side: other tests make a machine slower
        if of_long < max(6 * of_short, 0.02):
            return
        of_short, of_long = min(of_short, seconds(short)), min(of_long, seconds(long))
    raise AssertionError(f"{of_long} s for four times what takes {of_short} s")
