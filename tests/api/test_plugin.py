"""What the chat route has of vLLM's own objects."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from foldserve.server.api.plugin import _renderer


def test_the_renderer_is_vllms_but_for_processor_kwargs() -> None:
    """With arguments that a later vLLM adds."""
    theirs: Any = SimpleNamespace(trust_request_mm_kwargs=False, chat_template="x", added_later={"high": "max"})
    ours = _renderer(theirs)
    assert vars(ours) == vars(theirs) | {"trust_request_mm_kwargs": True}
    assert not theirs.trust_request_mm_kwargs
