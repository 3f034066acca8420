"""Finds the message that a chat template refuses: vLLM has only the template's words, and only in its log."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

from jinja2 import TemplateError

from foldserve.server.api.errors import InvalidRequest

_RENDERS = "safe_apply_chat_template"
"""vLLM's function around the template. Its local `conversation` holds the messages as the template sees them."""
_LONGEST_REASON = 200


def refusal(error: Exception, messages: int) -> InvalidRequest | None:
    """The refusal to show if a chat template ended in `error`, else None. `messages` is the request's count of them."""
    cause = error.__cause__
    conversation = next((f.f_locals.get("conversation") for f in _frames(error) if f.f_code.co_name == _RENDERS), None)
    if cause is None or conversation is None:
        return None
    # `raise_exception` of a template quotes the model's makers; any other error is a library's
    reason = f": {cause!s:.{_LONGEST_REASON}}" if type(cause) is TemplateError else ""
    at = _failing_message(cause, conversation)
    if at is None or len(conversation) != messages:  # system messages may have been merged
        return InvalidRequest(f"the model's chat template refuses these messages{reason}", "messages")
    role = conversation[at].get("role")
    path = f"messages[{at}]"
    return InvalidRequest(f"the model's chat template refuses {path} (role: {role!s:.40}){reason}", path)


def _failing_message(cause: BaseException, conversation: Sequence[Mapping[str, Any]]) -> int | None:
    """The message that the template was at: a variable of its innermost frame that holds one."""
    places = {id(message): place for place, message in enumerate(conversation)}
    found = [places[id(v)] for frame in _frames(cause) for v in frame.f_locals.values() if id(v) in places]
    return found[-1] if found else None


def _frames(error: BaseException) -> Iterator[FrameType]:
    return (frame for frame, _ in traceback.walk_tb(error.__traceback__))
