"""The HTTP routes of foldserve, and the refusal of vLLM's routes that would ignore a reduction."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import load_aware_call, validate_json_request, with_cancellation
from vllm.entrypoints.serve.utils.sse_keep_alive import with_sse_keep_alive

from foldserve.server.api import catalog
from foldserve.server.api.errors import UnsupportedRoute, render, render_vllm
from foldserve.server.api.schema import FoldChatRequest
from foldserve.server.api.serving import FoldServingChat

CHAT = "/v1/chat/completions"

_REFUSED = (
    f"{CHAT}/",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/systemone",
    "/inference/",
    "/invocations",
    "/cohere/",
    "/generative_scoring",
)

_Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class FoldRoute(APIRoute):
    """A route whose errors, those of validation too, are rendered by `errors.render`."""

    def get_route_handler(self) -> _Handler:
        handle = super().get_route_handler()

        async def rendered(request: Request) -> Response:
            try:
                return await handle(request)
            except HTTPException:
                raise
            except Exception as error:
                return render(error)

        return rendered


router = APIRouter(route_class=FoldRoute)


@router.post(
    CHAT,
    dependencies=[Depends(validate_json_request)],
    responses={HTTPStatus.OK: {"model": ChatCompletionResponse, "content": {"text/event-stream": {}}}},
)
@with_cancellation
@load_aware_call
async def create_chat_completion(request: FoldChatRequest, raw_request: Request) -> Response:
    """Answers a chat whose images cost as many vision tokens as the request says."""
    serving: FoldServingChat = raw_request.app.state.foldserve_chat
    answer = await serving.create_chat_completion(request, raw_request)
    if isinstance(answer, ErrorResponse):
        return render_vllm(answer)
    if isinstance(answer, ChatCompletionResponse):
        return JSONResponse(answer.model_dump())
    interval = float(raw_request.app.state.args.sse_keep_alive_interval)
    return StreamingResponse(with_sse_keep_alive(answer, interval), media_type="text/event-stream")


@router.get("/v1/reducers")
async def list_reducers(raw_request: Request) -> dict[str, object]:
    """What can be asked for on this server: methods, parameters, limits and defaults."""
    return catalog.describe(raw_request.app.state.foldserve_chat)


def refuse_other_routes(app: FastAPI) -> None:
    """Replaces every generating route that knows nothing of `reduction` by a clear error."""
    refusals = APIRouter(route_class=FoldRoute, include_in_schema=False)
    for route in app.routes:
        if isinstance(route, APIRoute) and route.path.startswith(_REFUSED):
            refusals.add_api_route(route.path, _refuse, methods=list(route.methods))
    app.include_router(refusals)


async def _refuse(raw_request: Request) -> None:
    raise UnsupportedRoute(f"{raw_request.scope['route'].path} is not served: send chats with images to POST {CHAT}")
