"""Keys that are meant for this server but would be ignored where they stand, and media that the model would not see.

vLLM ignores keys that it does not know, as clients expect. But a key that can only ask for a reduction, or that holds
an image or a video that the answer would not see, is refused, and the error names the right place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from foldserve.reducers.reduction import FIELDS
from foldserve.server.api.errors import InvalidRequest
from foldserve.server.api.limits.strict_json import Path, to_text
from foldserve.server.engine.family import Modality

ORDINARY_WORDS = frozenset({"decoder", "layers", "method", "positions", "query", "ratio", "scale", "window"})
"""Fields of `reduction` that mean other things elsewhere: refused only at the top of the body and beside media."""

_SHORT_FORM = '`"reduction_ratio": 0.5`'
_AT_THE_TOP = f"it would be ignored here: write {_SHORT_FORM} or `reduction` at the top of the body, for all its media"
URL_FIELDS: Mapping[Modality, str] = {"image": "image_url", "video": "video_url"}
"""Type of part -> the field in it that holds the URL."""
WITH_ARTICLE: Mapping[Modality, str] = {"image": "an image", "video": "a video"}
_PER_ITEM = {
    modality: f"{_AT_THE_TOP}; one {modality} has `detail` in its `{field}`" for modality, field in URL_FIELDS.items()
}
_EXTRA_BODY = "`extra_body` belongs to OpenAI's Python client, which sends what is in it at the top of the body: do so"
_NOT_SEEN = (
    "the model would not see it here: only images and videos are taken, as parts of a message's content such as "
    '{"type": "image_url", "image_url": {"url": ...}}'
)
_TWO_PARTS = "a part is a text, an image or a video: make two parts of it"

_LONGEST_NAME = 64
_SEPARATORS = str.maketrans("", "", "-_. ")


def _folded(key: str) -> str:
    """keepTokens, keep-tokens, KEEP_TOKENS -> keeptokens."""
    return key.translate(_SEPARATORS).casefold() if len(key) <= _LONGEST_NAME else ""


def _as_written(field: str) -> str:
    return f'`"reduction": {{"{field}": ...}}`'


_OURS = {_folded(field): _as_written(field) for field in FIELDS}
_OURS |= {_folded(f"reduction_{field}"): _as_written(field) for field in FIELDS}
_OURS |= {"reduction": f'`"reduction": {{...}}` or {_SHORT_FORM}', "reductionratio": _SHORT_FORM}
_ONLY_OURS = frozenset(_OURS) - {_folded(field) for field in ORDINARY_WORDS}
_MEDIA = re.compile(
    r"(input|experimental)?(image|picture|photo|file|attachment|audio|video|media)s?(url|data|base64|id)?s?"
)

_KNOWN = {
    "body": frozenset({"audio", "messages", "model", "reduction", "reduction_ratio"}),
    "message": frozenset({"content", "name", "role", "tool_call_id", "tool_calls"}),
    "text": frozenset({"refusal", "text", "thinking", "type"}),
    "image": frozenset({"detail", "image_url", "type"}),
    "video": frozenset({"detail", "type", "video_url"}),
    "url": frozenset({"detail", "url"}),
}
_NAMED_BY_USERS = ("documents", "functions", "metadata", "response_format", "structured_outputs", "tools")


def check_top(body: Mapping[str, Any]) -> None:
    """Checks the keys of the body and of objects in it, except messages and objects whose keys users make up.

    Raises InvalidRequest with the path of the key, and what to write instead. So do the checks below.
    """
    for key, value in _unknown(body, "body"):
        folded = _folded(key)
        if folded in _OURS:
            raise InvalidRequest(f"{key:.40} would be ignored: write {_OURS[folded]}", to_text((None, key)))
        _refuse(_extra_body(folded, value) or _unseen(folded, value), (None, key))
        if isinstance(value, dict | list) and key not in _NAMED_BY_USERS:
            _check_inside(value, (None, key))


def check_message(message: Mapping[str, Any], path: Path) -> None:
    """Checks a message's keys but not its content. Unknown keys may stay: clients send back what they were sent."""
    for key, value in _unknown(message, "message"):
        folded = _folded(key)
        fault = _AT_THE_TOP if folded in _ONLY_OURS else _extra_body(folded, value)
        is_openais = folded == "audio" and message.get("role") == "assistant"  # an earlier answer's
        _refuse(fault or (None if is_openais else _unseen(folded, value)), (path, key))


def check_text(part: Mapping[str, Any], path: Path) -> None:
    for key, value in _unknown(part, "text"):
        folded = _folded(key)
        fault = _AT_THE_TOP if folded in _ONLY_OURS else _extra_body(folded, value)
        _refuse(
            fault or (_TWO_PARTS if folded in ("imageurl", "videourl") and value else _unseen(folded, value)),
            (path, key),
        )


def check_media(part: Mapping[str, Any], modality: Modality, path: Path) -> None:
    """Checks the keys of an image or video part, and of its `image_url` or `video_url`."""
    for key, value in _unknown(part, modality):
        folded = _folded(key)
        fault = _PER_ITEM[modality] if folded in _OURS else _extra_body(folded, value)
        _refuse(fault or (_TWO_PARTS if folded == "text" and value else _unseen(folded, value)), (path, key))
    field = URL_FIELDS[modality]
    source = part.get(field)
    for key, value in _unknown(source, "url") if isinstance(source, dict) else ():
        folded = _folded(key)
        _refuse(_PER_ITEM[modality] if folded in _OURS else _extra_body(folded, value), ((path, field), key))


def _unknown(value: Mapping[str, Any], place: str) -> Iterator[tuple[str, Any]]:
    known = _KNOWN[place]
    return ((key, inner) for key, inner in value.items() if key not in known and inner is not None)


def _check_inside(value: Any, path: Path) -> None:
    waiting: list[tuple[Any, Path]] = [(value, path)]
    while waiting:
        item, path = waiting.pop()
        if isinstance(item, dict):
            for key, inner in item.items():
                folded = _folded(key)
                if inner is not None:
                    _refuse(_AT_THE_TOP if folded in _ONLY_OURS else _extra_body(folded, inner), (path, key))
        children = item.items() if isinstance(item, dict) else enumerate(item)
        waiting += [(inner, (path, key)) for key, inner in children if isinstance(inner, dict | list)]


def _extra_body(folded: str, value: Any) -> str | None:
    return _EXTRA_BODY if value and folded == "extrabody" else None


def _unseen(folded: str, value: Any) -> str | None:
    return _NOT_SEEN if value and _MEDIA.fullmatch(folded) else None


def _refuse(fault: str | None, path: Path) -> None:
    if fault is not None:
        raise InvalidRequest(fault, to_text(path))
