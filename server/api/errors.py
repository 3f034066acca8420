"""The tree of errors, and the one place that renders them, in OpenAI's shape.

    FoldserveError          500  server_error           internal_error
    ├── InvalidRequest      400  invalid_request_error  invalid_value
    │   ├── LimitExceeded       400                         limit_exceeded
    │   ├── InvalidImage        400                         invalid_image
    │   ├── RefusedUrl          400                         refused_image_url
    │   └── ImageUnavailable    400                         image_unavailable
    ├── BodyTooLarge        413  invalid_request_error  body_too_large
    ├── MalformedHttp       400  invalid_request_error  invalid_http; 408 request_timeout, 431 headers_too_large
    ├── Unauthorized        401  invalid_request_error  invalid_api_key
    ├── Forbidden           403  invalid_request_error  insufficient_permissions
    ├── UnsupportedRoute    404  invalid_request_error  unsupported_route
    ├── NoSuchModel         404  invalid_request_error  not_found
    ├── TooManyRequests     429  invalid_request_error  rate_limit_exceeded
    │   └── TooManyAtOnce       429                         concurrency_limit_exceeded
    └── Unavailable         503  server_error           overloaded
        ├── ShuttingDown    503                         shutting_down
        └── EngineStopped   503                         engine_stopped

`translate` converts errors of the libraries underneath (pydantic, vLLM, the reducers) into this tree.
"""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import Counter
from starlette.exceptions import HTTPException
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.v1.engine.exceptions import EngineDeadError

from foldserve.reducers.plan import InvalidReduction
from foldserve.server.api.library_errors import describe_pydantic_error, describe_refused_field

_LONGEST_MESSAGE = 500
_log = logging.getLogger(__name__)
_PACKAGE = Path(__file__).parents[2]
_REJECTED = Counter(
    "foldserve_requests_rejected", "Requests that were answered with an error, by its code.", ["reason"]
)


class FoldserveError(Exception):
    """The server is at fault.

    Base of the tree.

    Args:
        message: what was wrong, what came, what to do.
        param: JSON path of the offending field, such as `reduction.ratio` or `messages[0].content`.
    """

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    code = "internal_error"

    def __init__(self, message: str, param: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.headers = dict(headers or {})


class InvalidRequest(FoldserveError):
    """The request is at fault; sending it again unchanged fails again."""

    status = HTTPStatus.BAD_REQUEST
    code = "invalid_value"


class LimitExceeded(InvalidRequest):
    """A value above one of the server's limits."""

    code = "limit_exceeded"


class InvalidImage(InvalidRequest):
    """A file that is not an image, or is damaged."""

    code = "invalid_image"


class RefusedUrl(InvalidRequest):
    """An image's URL that the server refuses to fetch."""

    code = "refused_image_url"


class ImageUnavailable(InvalidRequest):
    """The image's server did not deliver it."""

    code = "image_unavailable"


class BodyTooLarge(FoldserveError):
    """A body that the server does not read to its end."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    code = "body_too_large"


class MalformedHttp(FoldserveError):
    """Bytes that are not an HTTP/1.1 request, or come too slowly."""

    status = HTTPStatus.BAD_REQUEST
    code = "invalid_http"

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = HTTPStatus(status)
        self.code = _HTTP_CODES.get(self.status, self.code)


_HTTP_CODES = {
    HTTPStatus.REQUEST_TIMEOUT: "request_timeout",
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: "headers_too_large",
}


class Unauthorized(FoldserveError):
    """No key, or an unknown one."""

    status = HTTPStatus.UNAUTHORIZED
    code = "invalid_api_key"

    def __init__(self, message: str, *, sent: bool = True) -> None:
        # RFC 6750, section 3: the error code only where a key came
        challenge = 'Bearer realm="foldserve"' + (', error="invalid_token"' if sent else "")
        super().__init__(message, headers={"WWW-Authenticate": challenge})


class Forbidden(FoldserveError):
    """A known key that may not do this."""

    status = HTTPStatus.FORBIDDEN
    code = "insufficient_permissions"

    def __init__(self, message: str, scope: str) -> None:
        challenge = f'Bearer realm="foldserve", error="insufficient_scope", scope="{scope}"'
        super().__init__(message, headers={"WWW-Authenticate": challenge})


class UnsupportedRoute(FoldserveError):
    """A route of vLLM that would ignore the reduction."""

    status = HTTPStatus.NOT_FOUND
    code = "unsupported_route"


class NoSuchModel(FoldserveError):
    """A model that this server does not serve."""

    status = HTTPStatus.NOT_FOUND
    code = "not_found"

    def __init__(self) -> None:
        super().__init__("no such model is served: see GET /v1/models", "model")


class _TryLater(FoldserveError):
    """The same request may succeed later, after `retry_after_s`, which is at least 1."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message, headers={"Retry-After": str(retry_after_s)})


class TooManyRequests(_TryLater):
    """A key asks more often than it may."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    code = "rate_limit_exceeded"


class TooManyAtOnce(TooManyRequests):
    """A key has as many answers in flight as it may have."""

    code = "concurrency_limit_exceeded"


class Unavailable(_TryLater):
    """The server has too much to do."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "overloaded"


class ShuttingDown(Unavailable):
    """The server finishes what it has begun and takes nothing new."""

    code = "shutting_down"


class EngineStopped(Unavailable):
    """The process that runs the model is gone; this server is about to end."""

    code = "engine_stopped"


Body = dict[str, dict[str, Any]]


def render_error(error: Exception, shape: Callable[[Body], dict[str, Any]] | None = None) -> JSONResponse:
    """Any error as `{"error": {"message", "type", "param", "code"}}` with its status and headers.

    Args:
        shape: converts that body to another API's.
    """
    known = translate(error)
    _REJECTED.labels(known.code).inc()
    body = _body(known)
    return JSONResponse(body if shape is None else shape(body), known.status, known.headers)


def render_error_event(error: Exception | ErrorResponse) -> str:
    """The body of `render_error`, as the data of an event in a stream."""
    if isinstance(error, ErrorResponse):
        error = from_vllm(error)
    known = translate(error)
    _REJECTED.labels(known.code).inc()
    return json.dumps(_body(known))


def translate(error: Exception) -> FoldserveError:
    """Converts a library's error to one of the tree. Only the log gets the text of a server error."""
    if isinstance(error, FoldserveError):
        return error
    if isinstance(error, RequestValidationError):
        return _from_pydantic(error.errors())
    if isinstance(error, InvalidReduction):
        return InvalidRequest(str(error), _reduction_path(error.param))
    if isinstance(error, HTTPException):
        return _from_http(error)
    if isinstance(error, EngineDeadError):
        return EngineStopped("the model stopped before the answer was complete: try again in a while", 10)
    translated = from_vllm(create_error_response(error))  # vLLM's own classification
    if translated.status == HTTPStatus.INTERNAL_SERVER_ERROR:
        _log.error("a request failed", exc_info=error)
    else:  # not its text, which may quote the request
        _log.info("refused by a library: %s in %s", type(error).__name__, _place(error))
    return translated


def _place(error: Exception) -> str:
    """Where it was raised, and the last line of foldserve before: a mistake of ours may look like the request's."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "an unknown place"
    own = [frame for frame in frames[:-1] if Path(frame.filename).is_relative_to(_PACKAGE)]
    return ", called from ".join(map(_line, [frames[-1], *own[-1:]]))


def _line(frame: traceback.FrameSummary) -> str:
    path = Path(frame.filename)
    return f"{path.parent.name}/{path.name}:{frame.lineno} ({frame.name})"


def from_vllm(response: ErrorResponse) -> FoldserveError:
    """vLLM's error in our own words, with its status and field."""
    status = HTTPStatus(response.error.code)
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        return Unavailable("the server has too much to do: try again later")
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return _with_status(FoldserveError("the server failed to answer: its log says why"), status)
    if status == HTTPStatus.NOT_FOUND:
        return NoSuchModel()
    param = _FIELDS.get(response.error.param or "", response.error.param)
    return _with_status(FoldserveError(describe_refused_field(param), param), status)


_FIELDS = {"input_text": "messages", "input_tokens": "messages"}  # what vLLM calls the prompt


def _from_http(error: HTTPException) -> FoldserveError:
    """The router's error in our own words."""
    if isinstance(error.__cause__, FoldserveError):
        return error.__cause__  # FastAPI wraps what reading the body raised
    status = HTTPStatus(error.status_code)
    message = _HTTP_MESSAGES.get(status, status.phrase)
    return _with_status(FoldserveError(message, headers=error.headers), status)


_HTTP_MESSAGES = {
    HTTPStatus.NOT_FOUND: "nothing is served at this path: see GET /openapi.json",
    HTTPStatus.METHOD_NOT_ALLOWED: "this path does not take this method: see the header Allow",
    HTTPStatus.BAD_REQUEST: "the body can't be read",
}


def _with_status(error: FoldserveError, status: HTTPStatus) -> FoldserveError:
    error.status = status
    if status != HTTPStatus.INTERNAL_SERVER_ERROR:
        error.code = _code(status)
    return error


def _from_pydantic(errors: Sequence[dict[str, object]]) -> FoldserveError:
    """The first validation error. A union reports one per member; the first member is the usual one."""
    if not errors or not isinstance(errors[0], dict):
        return InvalidRequest("the body must be JSON with `Content-Type: application/json`")
    first = errors[0]
    location = first.get("loc", ())
    path = _json_path(location[1:] if isinstance(location, tuple) else ())  # without the leading "body"
    if first.get("type") == "json_invalid":
        return InvalidRequest("the body is not valid JSON")
    context = first.get("ctx")
    cause = context.get("error") if isinstance(context, dict) else None
    if isinstance(cause, InvalidReduction):
        is_short_form = path == "reduction_ratio"
        return InvalidRequest(str(cause), path if is_short_form else _reduction_path(cause.param))
    return InvalidRequest(f"{path or 'the body'} {describe_pydantic_error(first)}", path or None)


def _reduction_path(param: str) -> str:
    return f"reduction.{param}" if param else "reduction"


def _json_path(location: Sequence[object]) -> str:
    """("messages", 0, "content") -> `messages[0].content`, without the names of union members."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif isinstance(part, str) and part.isidentifier() and not part[0].isupper() and part not in _TYPES:
            path += f".{part}" if path else part
    return path


_TYPES = ("bool", "dict", "float", "int", "list", "str")  # members of unions


def _code(status: HTTPStatus) -> str:
    return "invalid_value" if status == HTTPStatus.BAD_REQUEST else status.phrase.lower().replace(" ", "_")


def _body(error: FoldserveError) -> Body:
    text = str(error)
    message = text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]} ..."  # it quotes what came
    kind = "invalid_request_error" if error.status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
    return {"error": {"message": message, "type": kind, "param": error.param, "code": error.code}}
