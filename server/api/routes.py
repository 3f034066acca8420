"""The HTTP routes: foldserve's own, those of vLLM that are kept, and a refusal of all others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from http import HTTPStatus
from importlib.metadata import version
from typing import Annotated, Any, NoReturn

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.routing import Route
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import load_aware_call, validate_json_request, with_cancellation
from vllm.entrypoints.serve.utils.sse_keep_alive import with_sse_keep_alive

from foldserve.server.api import catalog
from foldserve.server.api.auth.guard import cache_salts
from foldserve.server.api.auth.route import FoldRoute, GuardedRoute, MetricsRoute, take_further_places
from foldserve.server.api.dialects import schemas, written_messages, written_responses
from foldserve.server.api.dialects.blocks import StreamWriter
from foldserve.server.api.dialects.route import MessagesRoute, ResponsesRoute, read_chat, translation_of
from foldserve.server.api.errors import NoSuchModel, UnsupportedRoute, from_vllm, render_error
from foldserve.server.api.lifecycle.health import health
from foldserve.server.api.limits.route import ChatRoute
from foldserve.server.api.playground.routes import playground
from foldserve.server.api.schema import FoldChatRequest
from foldserve.server.api.serving import FoldServingChat

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
MAP = "/v1/reductions/map"

# vLLM's own routes that stay. All others are refused, also those that a later version or a setting adds.
_KEPT = {
    "/metrics": MetricsRoute,
    "/v1/models": GuardedRoute,
    "/version": GuardedRoute,
    "/openapi.json": GuardedRoute,
    "/docs": GuardedRoute,
    "/docs/oauth2-redirect": GuardedRoute,
    "/redoc": GuardedRoute,
}
_log = logging.getLogger(__name__)
_DESCRIPTION = "OpenAI's chat API for images; every request chooses how many vision tokens they cost."
_STREAM: dict[str, Any] = {"text/event-stream": {}}
_EVENTS_AT_ONCE = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the second is for nginx
_DOCUMENTS_THE_KEY = [Depends(HTTPBearer(auto_error=False, description="where the server was given --api-keys"))]

router = APIRouter(route_class=GuardedRoute, dependencies=_DOCUMENTS_THE_KEY)
work = APIRouter(route_class=ChatRoute, dependencies=_DOCUMENTS_THE_KEY)
responses = APIRouter(route_class=ResponsesRoute, dependencies=_DOCUMENTS_THE_KEY)
messages = APIRouter(route_class=MessagesRoute, dependencies=_DOCUMENTS_THE_KEY)


@work.post(
    CHAT,
    dependencies=[Depends(validate_json_request)],
    responses={HTTPStatus.OK: {"model": ChatCompletionResponse, "content": _STREAM}},
)
@with_cancellation
@load_aware_call
async def create_chat_completion(request: FoldChatRequest, raw_request: Request) -> Response:
    """Answers a chat whose images cost as many vision tokens as the request says."""
    answer = await _answer(request, raw_request)
    if isinstance(answer, ChatCompletionResponse):
        return _json_response(answer.model_dump(), request)
    return _stream(answer, request, raw_request)


@responses.post(
    RESPONSES,
    dependencies=[Depends(validate_json_request)],
    openapi_extra=schemas.body(schemas.RESPONSES),
    responses={HTTPStatus.OK: {"content": _STREAM}},
)
@with_cancellation
@load_aware_call
async def create_response(request: Annotated[FoldChatRequest, Depends(read_chat)], raw_request: Request) -> Response:
    """Answers in the form of OpenAI's Responses API; answers are not stored."""
    return await _written(written_responses.ResponsesWriter, request, raw_request)


@messages.post(
    MESSAGES,
    dependencies=[Depends(validate_json_request)],
    openapi_extra=schemas.body(schemas.MESSAGES),
    responses={HTTPStatus.OK: {"content": _STREAM}},
)
@with_cancellation
@load_aware_call
async def create_message(request: Annotated[FoldChatRequest, Depends(read_chat)], raw_request: Request) -> Response:
    """Answers in the form of Anthropic's Messages API."""
    return await _written(written_messages.MessagesWriter, request, raw_request)


async def _written(writer: type[StreamWriter], request: FoldChatRequest, raw_request: Request) -> Response:
    answer, translation = await _answer(request, raw_request), translation_of(raw_request)
    if isinstance(answer, ChatCompletionResponse):
        return _json_response(writer.whole(answer, translation), request)
    return _stream(writer(translation, request.progress.vision).written(answer), request, raw_request)


async def _answer(request: FoldChatRequest, raw_request: Request) -> ChatCompletionResponse | AsyncGenerator[str, None]:
    serving = _prepared(request, raw_request)
    take_further_places(raw_request.scope, (request.n or 1) - 1)
    answer = await serving.create_chat_completion(request, raw_request)
    if isinstance(answer, ErrorResponse):
        _refuse_with(answer)
    return answer


def _refuse_with(answer: ErrorResponse) -> NoReturn:
    """Raises vLLM's error, or CancelledError for a cancelled request, whose error asyncio would log."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
    raise from_vllm(answer)


def _headers(request: FoldChatRequest) -> dict[str, str]:
    vision = request.progress.vision
    return {} if vision is None else {"X-Foldserve-Vision-Tokens": vision.to_header()}


def _json_response(body: dict[str, Any], request: FoldChatRequest) -> Response:
    return JSONResponse(body, headers=_headers(request))


def _stream(events: AsyncGenerator[str, None], request: FoldChatRequest, raw_request: Request) -> Response:
    interval = float(raw_request.app.state.args.sse_keep_alive_interval)
    return StreamingResponse(
        with_sse_keep_alive(events, interval),
        headers=_headers(request) | _EVENTS_AT_ONCE,
        media_type="text/event-stream",
    )


def _prepared(request: FoldChatRequest, raw_request: Request) -> FoldServingChat:
    """The handler of a request that it has checked and that now knows its key."""
    serving: FoldServingChat = raw_request.app.state.foldserve_chat
    key = raw_request.state.foldserve_key
    serving.checks.check(request)
    salts = cache_salts(key, request.cache_salt)
    request.cache_salt, request.progress.image_salt = salts.blocks, salts.images
    request.progress.owner = None if key is None else key.name
    return serving


@work.post(MAP, dependencies=[Depends(validate_json_request)])
@with_cancellation
async def map_reduction(request: FoldChatRequest, raw_request: Request) -> Response:
    """Tells where each vision token of a chat's images and videos would go; fields about the answer have no effect.

    For each grid, in raster order, `group` has the index of the group that a token goes into, or -1 if it is dropped.
    """
    answer = await _prepared(request, raw_request).map_tokens(request)
    if isinstance(answer, ErrorResponse):
        _refuse_with(answer)
    return JSONResponse(answer)


@router.get("/v1/models/{model:path}", tags=["models"])
async def retrieve_model(model: str, raw_request: Request) -> JSONResponse:
    """One entry of `GET /v1/models`; an id may hold slashes."""
    served = await raw_request.app.state.openai_serving_models.show_available_models()
    for card in served.data:
        if card.id == model:
            return JSONResponse(card.model_dump())
    raise NoSuchModel()


@router.get("/v1/reducers")
async def list_reducers(raw_request: Request) -> dict[str, object]:
    """Methods, parameters, limits and defaults of this server."""
    return catalog.describe(raw_request.app.state.foldserve_chat)


def replace_routes(app: FastAPI) -> None:
    """Replaces vLLM's routes by ours; keeps a few of them and refuses the others."""
    ours = (work, responses, messages, health, router, playground)
    paths = {route.path for some in ours for route in some.routes if isinstance(route, Route)}
    theirs = [route for route in app.routes if isinstance(route, Route) and route.path not in paths]
    app.router.routes.clear()
    app.title, app.version, app.description = "foldserve", version("foldserve"), _DESCRIPTION
    app.router.redirect_slashes = False  # it would redirect to whatever the header Host says
    for some in ours:  # first, since routes are tried in order, twice a request
        app.include_router(some)
    for route in theirs:
        kind = _KEPT.get(route.path)
        endpoint, schema = (route.endpoint, route.include_in_schema) if kind else (_refuse, False)
        app.include_router(_router_of(kind or GuardedRoute, route, endpoint, schema))
    app.add_exception_handler(HTTPException, _render_http)  # the router's own: no such path, or method


def _router_of(kind: type[FoldRoute], route: Route, endpoint: Any, schema: bool) -> APIRouter:
    one = APIRouter(route_class=kind, dependencies=_DOCUMENTS_THE_KEY)
    one.add_api_route(route.path, endpoint, methods=sorted(route.methods or ()), include_in_schema=schema)
    return one


async def _refuse(raw_request: Request) -> None:
    raise UnsupportedRoute(f"{raw_request.scope['route'].path} is not served: send chats with images to POST {CHAT}")


async def _render_http(request: Request, error: Exception) -> Response:
    return render_error(error)


def drop_foreign_routes(app: FastAPI) -> None:
    """Removes routes that vLLM added after ours (SageMaker's handlers), which would bypass our checks."""
    foreign = [route for route in app.routes if not isinstance(route, FoldRoute)]
    for route in foreign:
        _log.warning("not served, since it was added behind the checks: %s", getattr(route, "path", route))
        app.router.routes.remove(route)
