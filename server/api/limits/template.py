"""Which message a chat template refuses: vLLM tells the template's words only, and not to the client."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

from jinja2 import TemplateError

from foldserve.server.api.errors import InvalidRequest

_RENDERS = "safe_apply_chat_template"
"""vLLM's function around the template, which holds the `conversation`: the messages as the template sees them."""
_LONGEST_REASON = 200


def refusal(error: Exception, messages: int) -> InvalidRequest | None:
    """The refusal to show if a chat template ended in `error`, else None.

    Args:
        messages: number of the request's.
    """
    cause = error.__cause__
    conversation = next((f.f_locals.get("conversation") for f in _frames(error) if f.f_code.co_name == _RENDERS), None)
    if cause is None or conversation is None:
        return None
    # `raise_exception` in a template: words of the model's makers; any other error's are a library's
    reason = f": {cause!s:.{_LONGEST_REASON}}" if type(cause) is TemplateError else ""
    at = _at(cause, conversation)
    if at is None or len(conversation) != messages:  # system messages may have been put together
        return InvalidRequest(f"the model's chat template refuses these messages{reason}", "messages")
    role = conversation[at].get("role")
    path = f"messages[{at}]"
    return InvalidRequest(f"the model's chat template refuses {path} (role: {role!s:.40}){reason}", path)


def _at(cause: BaseException, conversation: Sequence[Mapping[str, Any]]) -> int | None:
    """The message that the template was at: a variable of its innermost frame that has one."""
    places = {id(message): place for place, message in enumerate(conversation)}
    found = [places[id(v)] for frame in _frames(cause) for v in frame.f_locals.values() if id(v) in places]
    return found[-1] if found else None


def _frames(error: BaseException) -> Iterator[FrameType]:
    return (frame for frame, _ in traceback.walk_tb(error.__traceback__))
