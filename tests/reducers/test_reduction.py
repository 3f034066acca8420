"""`Reduction.parse`: what it takes, what it refuses and with which field."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foldserve.reducers import METHODS
from foldserve.reducers.base_only import BaseOnly
from foldserve.reducers.method import InDecoder
from foldserve.reducers.plan import InvalidReduction, Reduction

amounts: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"ratio": st.floats(0, 1, exclude_max=True) | st.just(0)}),
    st.fixed_dictionaries({"keep_tokens": st.integers(2, 10**6)}),
)


@st.composite
def reductions(draw: st.DrawFn) -> dict[str, Any]:
    """Valid JSON forms."""
    method = draw(
        st.sampled_from(sorted(name for name, m in METHODS.items() if not isinstance(m, BaseOnly | InDecoder)))
    )
    optional: dict[str, st.SearchStrategy[Any]] = {"withdraw": st.booleans()}
    optional |= {o.name: st.just(o.default) for o in METHODS[method].options if o.default is not None}
    if METHODS[method].takes_query:
        optional["query"] = st.text(max_size=9)
    if method == "illava":
        optional["layers"] = st.sampled_from([[5, 6, 7, 8], [0, 62]])  # by default the model's
    if method == "visionzip":
        optional["class_token"] = st.booleans()  # by default the model's
    if method == "folder":
        optional["scale"] = st.sampled_from(["none", "official"])
    return {"method": method} | draw(amounts) | draw(st.fixed_dictionaries({}, optional=optional))


@given(reductions())
def test_json_round_trip(value: dict[str, Any]) -> None:
    reduction = Reduction.parse(value)
    assert Reduction.parse(reduction.to_json()) == reduction
    assert all(value[name] == given for name, given in reduction.to_json().items())


@pytest.mark.parametrize("value", [{}, {"ratio": 0}, {"ratio": 0.0}, {"ratio": -0.0}, {"method": "folder"}], ids=str)
def test_nothing_asked_is_the_default(value: dict[str, Any]) -> None:
    assert Reduction.parse(value) == Reduction()
    assert Reduction.parse(value).to_json() == {}


@pytest.mark.parametrize(
    "value",
    [{"method": "withdraw"}, {"withdraw": True}, {"method": "folder+withdraw"}],
    ids=["alone", "flag", "joined"],
)
def test_ways_to_ask_for_withdrawal(value: dict[str, Any]) -> None:
    assert Reduction.parse(value) == Reduction(decoder="withdraw")
    assert Reduction.parse(value | {"withdraw": True}).to_json() == {"withdraw": True}


def test_both_names_of_what_cannot_be_combined() -> None:
    with pytest.raises(InvalidReduction, match=r"'folder' \(after tower\) and 'folder_cls' \(in tower\)"):
        Reduction.parse({"method": "folder+folder_cls"})


REFUSED = [
    ({"ratio": -0.1}, "ratio"),
    ({"ratio": 1}, "ratio"),
    ({"ratio": 1.0}, "ratio"),
    ({"ratio": 1.5}, "ratio"),
    ({"ratio": math.nan}, "ratio"),
    ({"ratio": math.inf}, "ratio"),
    ({"ratio": "0.5"}, "ratio"),
    ({"ratio": True}, "ratio"),
    ({"ratio": False}, "ratio"),
    ({"ratio": None}, "ratio"),
    ({"ratio": []}, "ratio"),
    ({"ratio": {}}, "ratio"),
    ({"ratio": 0.5, "keep_tokens": 288}, "ratio"),
    ({"ratio": 0, "keep_tokens": 288}, "ratio"),
    ({"keep_tokens": 1}, "keep_tokens"),
    ({"keep_tokens": 0}, "keep_tokens"),
    ({"keep_tokens": -5}, "keep_tokens"),
    ({"keep_tokens": 288.0}, "keep_tokens"),
    ({"keep_tokens": "288"}, "keep_tokens"),
    ({"keep_tokens": True}, "keep_tokens"),
    ({"method": "Folder"}, "method"),
    ({"method": "none"}, "method"),
    ({"method": ""}, "method"),
    ({"method": None}, "method"),
    ({"method": ["folder"]}, "method"),
    ({"scale": "paper"}, "scale"),
    ({"scale": True}, "scale"),
    ({"scale": ["official"]}, "scale"),
    ({"method": "folder_cls", "scale": "official"}, "scale"),
    ({"method": "folder+folder_cls"}, "method"),
    ({"method": "withdraw+folder"}, "method"),
    ({"method": "folder+folder_cls+withdraw"}, "method"),
    ({"method": "folder+"}, "method"),
    ({"method": "withdraw", "ratio": 0.5}, "ratio"),
    ({"method": "withdraw", "keep_tokens": 5}, "keep_tokens"),
    ({"method": "withdraw", "ratio": 0.5, "decoder_ratio": 0.5}, "ratio"),
    ({"method": "folder", "ratio": 0.5, "decoder_ratio": 0.5}, "decoder_ratio"),
    ({"method": "folder", "decoder": True}, "decoder"),
    ({"decoder": "true"}, "decoder"),
    ({"withdraw": 1}, "withdraw"),
    ({"withdraw": "true"}, "withdraw"),
    ({"ratio": 0.5, "query": "where?"}, "query"),
    ({"method": "fastv", "query": "where?"}, "query"),
    ({"method": "base_only", "query": "where?"}, "query"),
    ({"method": "mmtok", "query": ["where?"]}, "query"),
    ({"method": "mmtok", "query": "x" * 4097}, "query"),
    ({"method": "mmtok", "query": None}, "query"),
    ({"rate": 0.5}, "rate"),
    ({"": 0.5}, ""),
    ({1: 0.5}, "1"),
    ([], ""),
    (0.5, ""),
    (None, ""),
    ("folder", ""),
]


@pytest.mark.parametrize(("value", "param"), REFUSED, ids=[str(value) for value, _ in REFUSED])
def test_refused(value: object, param: str) -> None:
    with pytest.raises(InvalidReduction) as refusal:
        Reduction.parse(value)
    assert refusal.value.param == param
    assert str(refusal.value)


def test_a_query_is_for_methods_that_take_one() -> None:
    asked = {"method": "mmtok", "ratio": 0.5, "query": "x" * 4096}
    assert Reduction.parse(asked).to_json() == asked
    with pytest.raises(InvalidReduction, match="takes no query, only method, ratio, keep_tokens") as refusal:
        Reduction.parse(asked | {"method": "folder"})
    assert "only" in str(refusal.value) and "query" not in str(refusal.value).partition("only")[2]
    with pytest.raises(InvalidReduction, match="4097 characters, and may have 4096"):
        Reduction.parse(asked | {"query": "x" * 4097})


def test_constructor_is_as_strict() -> None:
    with pytest.raises(InvalidReduction, match="share of vision tokens to remove"):
        Reduction(ratio=1.5)


def test_refusal_survives_a_process_boundary() -> None:
    refusal = InvalidReduction("ratio must be a number", "ratio")
    copy = pickle.loads(pickle.dumps(refusal))
    assert (type(copy), str(copy), copy.param) == (InvalidReduction, "ratio must be a number", "ratio")


def test_message_stays_short() -> None:
    with pytest.raises(InvalidReduction) as refusal:
        Reduction.parse({"method": "x" * 100_000})
    assert len(str(refusal.value)) < 300
