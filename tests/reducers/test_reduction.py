"""`Reduction.parse`: what it takes, what it refuses and with which field."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foldserve.reducers import METHODS
from foldserve.reducers.plan import InvalidReduction, Reduction

amounts: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"ratio": st.floats(0, 1, exclude_max=True) | st.just(0)}),
    st.fixed_dictionaries({"keep_tokens": st.integers(2, 10**6)}),
)


@st.composite
def reductions(draw: st.DrawFn) -> dict[str, Any]:
    """Valid JSON forms."""
    method = draw(st.sampled_from(sorted(METHODS)))
    optional: dict[str, st.SearchStrategy[Any]] = {"withdraw": st.booleans()}
    if "scale" in METHODS[method].parameters:
        optional["scale"] = st.sampled_from(["none", "official"])
    return {"method": method} | draw(amounts) | draw(st.fixed_dictionaries({}, optional=optional))


@given(reductions())
def test_json_round_trip(value: dict[str, Any]) -> None:
    reduction = Reduction.parse(value)
    assert Reduction.parse(reduction.to_json()) == reduction
    assert reduction.to_json().items() <= value.items() | {("ratio", float(value.get("ratio", 0)))}


@pytest.mark.parametrize("value", [{}, {"ratio": 0}, {"ratio": 0.0}, {"ratio": -0.0}, {"method": "folder"}], ids=str)
def test_nothing_asked_is_the_default(value: dict[str, Any]) -> None:
    assert Reduction.parse(value) == Reduction()
    assert Reduction.parse(value).to_json() == {}


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
    ({"withdraw": 1}, "withdraw"),
    ({"withdraw": "true"}, "withdraw"),
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
    assert len(str(refusal.value)) < 200
