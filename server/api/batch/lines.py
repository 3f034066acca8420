"""One line of a batch file, in OpenAI's format: `custom_id`, `method`, `url`, `body`."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import jiter

from foldserve.server.api.errors import BodyTooLarge, InvalidRequest, UnsupportedRoute
from foldserve.server.api.limits.strict_json import parse
from foldserve.server.limits import Limits

FIELDS = ("custom_id", "method", "url", "body")
LONGEST_ID = 512
_ENVELOPE_BYTES = 64 << 10  # for the rest of a line besides its body
_HEAD_BYTES = 4096  # kept of a line that is too long: `custom_id` usually comes first
_SKIP_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class BatchLine:
    """A line that is not blank. `number` counts from 1, blank lines included.

    `content` has only the first bytes of a line that is not whole.
    """

    number: int
    content: bytes
    is_whole: bool = True

    @property
    def custom_id(self) -> str | None:
        """None if it can't be read."""
        try:
            value = jiter.from_json(self.content, cache_mode="none", partial_mode=not self.is_whole)
        except ValueError:
            return None
        found = value.get("custom_id") if isinstance(value, dict) else None
        return found if isinstance(found, str) and 0 < len(found) <= LONGEST_ID else None


def longest_line(limits: Limits) -> int:
    """Most bytes of a line whose body is within the limits."""
    return limits.max_body_bytes + _ENVELOPE_BYTES


def read_lines(file: BinaryIO, longest: int) -> Iterator[BatchLine]:
    """Yields the lines of a file, and holds one at a time."""
    number = 0
    while content := file.readline(longest + 1):
        number += 1
        is_whole = len(content) <= longest or content.endswith(b"\n")
        piece = content
        while not piece.endswith(b"\n") and (piece := file.readline(_SKIP_BYTES)):
            continue
        if content.strip():
            yield BatchLine(number, content if is_whole else content[:_HEAD_BYTES], is_whole)


def read_request(line: BatchLine, urls: Collection[str], limits: Limits) -> tuple[str, dict[str, Any]]:
    """The url and the body of a line; `urls` are those that are served.

    Raises InvalidRequest, UnsupportedRoute or BodyTooLarge for an invalid line; its body is not checked.
    """
    if not line.is_whole:
        raise BodyTooLarge(f"the line is longer than a body of {limits.max_body_mb:g} MB (--max-body-mb)")
    roomy = replace(
        limits, max_json_depth=limits.max_json_depth + 1, max_json_items=limits.max_json_items + len(FIELDS)
    )
    try:
        value = parse(line.content, roomy)
    except InvalidRequest as error:
        error.args = (str(error).replace("the body", "the line"),)
        raise
    if not isinstance(value, dict):
        raise InvalidRequest("the line must be a JSON object")
    for name in FIELDS:
        if name not in value:
            raise InvalidRequest(f"`{name}` is missing: a line has {', '.join(FIELDS)}", name)
    if unknown := value.keys() - set(FIELDS):
        name = min(unknown)
        raise InvalidRequest(
            f"a line has {', '.join(FIELDS)}, not {name!r:.50}: a request's fields go into `body`", name
        )
    if line.custom_id is None:
        raise InvalidRequest(f"custom_id must be a string of 1 to {LONGEST_ID} characters", "custom_id")
    if value["method"] != "POST":
        raise InvalidRequest(f"method must be POST; got {value['method']!r:.50}", "method")
    url, body = value["url"], value["body"]
    if not isinstance(url, str) or url not in urls:
        raise UnsupportedRoute(f"url must be {' or '.join(sorted(urls))}; got {url!r:.100}", "url")
    if not isinstance(body, dict):
        raise InvalidRequest("body must be a JSON object", "body")
    if body.get("stream"):
        raise InvalidRequest("a batch's answers come whole: leave `stream` out", "body.stream")
    return url, body
