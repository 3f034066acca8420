"""Routes of the other APIs: as the chat's, but they translate the body, and errors name the fields of the API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from foldserve.server.api.dialects import messages, responses, written_messages
from foldserve.server.api.dialects.translation import Translation
from foldserve.server.api.errors import render_error, translate
from foldserve.server.api.limits.route import ChatRoute, CheckedRequest
from foldserve.server.api.schema import FoldChatRequest
from foldserve.server.limits import Limits


class TranslatedRequest(CheckedRequest):
    """A request whose JSON is translated to a chat's."""

    translation: Translation | None = None

    def read(self, content: bytes) -> Any:
        return self.checks.read(content, self._translate)

    def _translate(self, body: dict[str, Any]) -> dict[str, Any]:
        self.translation = self.translate(body, self.checks.limits)
        return self.translation.chat

    @staticmethod
    def translate(body: Mapping[str, Any], limits: Limits) -> Translation:
        """Translates the API's body to a chat's."""
        raise NotImplementedError

    async def chat(self) -> FoldChatRequest:
        """The chat request; raises RequestValidationError if its fields can't be read."""
        try:
            return FoldChatRequest.model_validate(await self.json())
        except ValidationError as error:
            raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in error.errors()]) from error
        finally:
            self._json = None  # not kept while the answer is generated
            if self.translation is not None:
                self.translation.chat = {}


async def read_chat(raw_request: Request) -> FoldChatRequest:
    """A FastAPI dependency. Otherwise FastAPI would document the chat's fields as the body's."""
    assert isinstance(raw_request, TranslatedRequest)
    return await raw_request.chat()


def translation_of(raw_request: Request) -> Translation:
    assert isinstance(raw_request, TranslatedRequest)
    assert raw_request.translation is not None
    return raw_request.translation


class _TranslatedRoute(ChatRoute):
    def explain(self, error: Exception, request: Request) -> Exception:
        known = translate(super().explain(error, request))
        translation = request.translation if isinstance(request, TranslatedRequest) else None
        return known if translation is None else translation.explain(known)


class _ResponsesRequest(TranslatedRequest):
    translate = staticmethod(responses.to_chat)


class ResponsesRoute(_TranslatedRoute):
    request_class = _ResponsesRequest


class _MessagesRequest(TranslatedRequest):
    translate = staticmethod(messages.to_chat)


class MessagesRoute(_TranslatedRoute):
    """Anthropic's Messages API, with errors in its shape, and its header for the key."""

    request_class = _MessagesRequest
    key_header = "x-api-key"

    def render(self, error: Exception) -> Response:
        return render_error(error, written_messages.error_body)
