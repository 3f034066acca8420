"""JSON with one meaning only: UTF-8, no duplicate key, no NaN, bounded in size and depth (RFC 8259, sections 4-9)."""

from __future__ import annotations

import json
import math
from typing import Any

import jiter  # pydantic's parser, seven times as fast as the standard library, and vLLM has it already

from foldserve.server.api.errors import InvalidRequest, LimitExceeded
from foldserve.server.api.limits import coding
from foldserve.server.limits import Limits

_LARGEST_INTEGER = 2**63 - 1
Path = tuple[Any, str | int] | None  # (path of the container, key in it)


class _DuplicateKeys(dict[str, Any]):
    """An object in which `key` came more than once."""

    key: str


def parse(body: bytes, limits: Limits) -> Any:
    """The value of a body.

    Raises LimitExceeded for too many values or too deep nesting, and InvalidRequest for anything but JSON that all
    readers understand alike; `param` is the path if it is known.
    """
    most = limits.max_json_items
    if len(body) > most and sum(map(body.count, (b",", b"[", b"{"))) > most:
        raise LimitExceeded(f"the body holds more than {most} values")
    try:
        value = jiter.from_json(body, allow_inf_nan=False, cache_mode="none", catch_duplicate_keys=True)
    except ValueError:
        value = _explain(body, limits)
        _check(value, limits)
        return value
    if not _is_plain(value, limits.max_json_depth):
        _check(value, limits)
    return value


def _is_plain(value: Any, depth: int) -> bool:
    """Whether a value is certainly valid; if not, `_check` looks closer, as at a large number or at the greatest depth.

    The fast parser has already refused half surrogate pairs and duplicate keys.
    """
    if depth < 2:
        return False
    for child in value.values() if type(value) is dict else value if type(value) is list else (value,):
        kind = type(child)
        if kind is dict or kind is list:
            if not _is_plain(child, depth - 1):
                return False
        elif kind in (int, float) and not -_LARGEST_INTEGER <= child <= _LARGEST_INTEGER:
            return False
    return True


def _explain(body: bytes, limits: Limits) -> Any:
    """Parses what the fast parser refused, so that `_check` finds and names the fault."""
    coding.check_bytes(body)
    try:
        return json.loads(body.decode(), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise InvalidRequest("the body is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: see character {error.pos}") from error
    except RecursionError as error:
        raise _too_deep(limits) from error
    except ValueError as error:
        raise InvalidRequest("the body holds a number with thousands of digits") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    seen: set[str] = set()
    twice = _DuplicateKeys(value)
    twice.key = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    return twice


def _check(value: Any, limits: Limits) -> None:
    level: list[tuple[Any, Path]] = [(value, None)]
    for _ in range(limits.max_json_depth):
        inner: list[tuple[Any, Path]] = []
        for item, path in level:
            if isinstance(item, dict):
                _check_keys(item, path)
                inner += [(child, (path, key)) for key, child in item.items()]
            elif isinstance(item, list):
                inner += [(child, (path, index)) for index, child in enumerate(item)]
            else:
                _check_scalar(item, path)
        if not inner:
            return
        level = inner
    raise _too_deep(limits)


def _check_keys(item: dict[str, Any], path: Path) -> None:
    if isinstance(item, _DuplicateKeys):
        raise InvalidRequest("a key came twice in one object: send it once", to_text((path, item.key)))
    for key in item:
        _check_scalar(key, path)


def _check_scalar(item: object, path: Path) -> None:
    if isinstance(item, str):
        if not item.isascii() and not _is_unicode(item):
            raise InvalidRequest("the text holds half of a surrogate pair", to_text(path))
    elif isinstance(item, float):
        if not math.isfinite(item):
            raise InvalidRequest("numbers must be finite", to_text(path))
    elif isinstance(item, int) and abs(item) > _LARGEST_INTEGER:
        raise InvalidRequest("integers must fit into 64 bits", to_text(path))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def to_text(path: Path) -> str | None:
    """`messages[0].content`; None for the body itself."""
    keys: list[str | int] = []
    while path is not None:
        path, key = path
        keys.append(key)
    text = ""
    for key in reversed(keys):
        if isinstance(key, int) or not key.isidentifier():
            text += f"[{key!r:.40}]"
        else:
            text += f".{key:.40}" if text else f"{key:.40}"
    return text or None


def _too_deep(limits: Limits) -> LimitExceeded:
    return LimitExceeded(f"the body's JSON is nested more than {limits.max_json_depth} deep")
