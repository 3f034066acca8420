"""The query of an image: the text of its message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from foldserve.reducers import METHODS
from foldserve.reducers.reduction import MAX_QUERY, Reduction


def text_of(content: Sequence[Mapping[str, Any]]) -> str:
    """The text parts of a chat message, cut to the longest allowed query."""
    return "\n".join(part["text"] for part in content if isinstance(part.get("text"), str))[:MAX_QUERY]


def with_query(reduction: Reduction, text: str) -> Reduction:
    """Use the message's text as the query if the method takes one and none is given."""
    if reduction.query is not None or not METHODS[reduction.method].takes_query:
        return reduction
    return replace(reduction, query=text)
