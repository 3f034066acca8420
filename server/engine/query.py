"""What an image is asked about: the text beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from foldserve.reducers import METHODS
from foldserve.reducers.reduction import MAX_QUERY, Reduction


def text_of(content: Sequence[Mapping[str, Any]]) -> str:
    """The text parts of a chat message, as far as a query may be long."""
    return "\n".join(part["text"] for part in content if isinstance(part.get("text"), str))[:MAX_QUERY]


def with_query(reduction: Reduction, text: str) -> Reduction:
    """Has the text of its message for a query, where the method takes one and none is given."""
    if reduction.query is not None or not METHODS[reduction.method].takes_query:
        return reduction
    return replace(reduction, query=text)
