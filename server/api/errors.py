"""One tree of errors and the one place that renders them, in OpenAI's shape.

    FoldserveError          500  server_error           internal_error
    ├── InvalidRequest      400  invalid_request_error  invalid_value
    └── UnsupportedRoute    404  invalid_request_error  unsupported_route

Errors of the libraries underneath (pydantic, vLLM, the reducers) are translated into the tree by `translate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from foldserve.reducers.plan import InvalidReduction

_LONGEST_MESSAGE = 500


class FoldserveError(Exception):
    """Base of the tree.

    Args:
        message: what was wrong, what came, what to do.
        param: JSON path of the offending field, `reduction.ratio` or `messages[0].content`.
    """

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    code = "internal_error"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidRequest(FoldserveError):
    """The request is at fault; sending it again unchanged fails again."""

    status = HTTPStatus.BAD_REQUEST
    code = "invalid_value"


class UnsupportedRoute(FoldserveError):
    """A route of vLLM that would ignore the reduction."""

    status = HTTPStatus.NOT_FOUND
    code = "unsupported_route"


def render(error: Exception) -> JSONResponse:
    """Any error as `{"error": {"message", "type", "param", "code"}}` with its status."""
    if not isinstance(error, FoldserveError):
        error = translate(error)
    return _response(error.status, str(error), error.param, error.code)


def render_vllm(response: ErrorResponse) -> JSONResponse:
    """vLLM's own error response in the same shape."""
    status = HTTPStatus(response.error.code)
    return _response(status, response.error.message, response.error.param, _code(status))


def translate(error: Exception) -> FoldserveError:
    """The tree's error for one of a library's."""
    if isinstance(error, RequestValidationError):
        return _from_pydantic(error.errors())
    if isinstance(error, InvalidReduction):
        return InvalidRequest(str(error), _reduction_path(error.param))
    known = create_error_response(error).error  # vLLM's own classification, with paths and addresses taken out
    translated = FoldserveError(known.message, known.param)
    translated.status = HTTPStatus(known.code)
    translated.code = _code(translated.status)
    return translated


def _from_pydantic(errors: Sequence[dict[str, object]]) -> FoldserveError:
    """The first validation error; a union reports one per member, and the first member is the usual one."""
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
    return InvalidRequest(f"{path or 'body'}: {first.get('msg')}", path or None)


def _reduction_path(param: str) -> str:
    return f"reduction.{param}" if param else "reduction"


def _json_path(location: Sequence[object]) -> str:
    """("messages", 0, "content") -> `messages[0].content`; names of union members are left out."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif isinstance(part, str) and part.isidentifier() and not part[0].isupper():
            path += f".{part}" if path else part
    return path


def _code(status: HTTPStatus) -> str:
    return "invalid_value" if status == HTTPStatus.BAD_REQUEST else status.phrase.lower().replace(" ", "_")


def _response(status: HTTPStatus, message: str, param: str | None, code: str) -> JSONResponse:
    message = (
        message if len(message) <= _LONGEST_MESSAGE else f"{message[:_LONGEST_MESSAGE]} ..."
    )  # it quotes what came
    kind = "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": code}}, status)
