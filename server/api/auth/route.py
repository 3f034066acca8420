"""The kinds of routes: what each checks before it reads the body.

A check belongs to the matched route, because a header can bend the text of a path (CVE-2026-48746). A FastAPI
dependency would run only after the body, which a stranger could make large, was read and parsed.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from typing import Any, ClassVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import Headers, State
from starlette.routing import Match
from starlette.types import Message, Receive, Scope, Send

from foldserve.server.api.auth.guard import AuthGuard
from foldserve.server.api.auth.keys import Key
from foldserve.server.api.auth.keys import Scope as KeyScope
from foldserve.server.api.errors import FoldserveError, render_error

_PLACES = "foldserve_places"
_Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class FoldRoute(APIRoute):
    """A route that renders all errors, also of validation, by `errors.render_error`; it allows HEAD with GET."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        return super().matches({**scope, "method": "GET"} if self._is_head(scope) else scope)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._is_head(scope):
            await self.app(scope, receive, send)  # the connection leaves the body out
        else:
            await super().handle(scope, receive, send)

    def _is_head(self, scope: Scope) -> bool:
        return scope.get("method") == "HEAD" and "GET" in (self.methods or ())

    def get_route_handler(self) -> _Handler:
        handle = super().get_route_handler()

        async def rendered(request: Request) -> Response:
            try:
                return await handle(request)
            except Exception as error:
                return self.render(self.explain(error, request))

        return rendered

    def explain(self, error: Exception, request: Request) -> Exception:
        """The error to show for an error that ended a request."""
        shown: Exception = request.app.state.foldserve_lifecycle.explain(error)
        return shown

    def render(self, error: Exception) -> Response:
        return render_error(error)


class OpenRoute(FoldRoute):
    """A route for everybody, whose successful requests are not logged."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})["foldserve_quiet"] = True
        await super().handle(scope, receive, send)


class GuardedRoute(FoldRoute):
    """A route that needs a key if the server has keys, and a server that is not shutting down."""

    key_scope: ClassVar[KeyScope] = "api"
    key_header: ClassVar[str | None] = None
    """Header that may hold the key instead of `Authorization`."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope["app"].state
        with ExitStack() as held:
            try:
                key = state.foldserve_guard.identify(Headers(scope=scope), self.key_scope, self.key_header)
                scope.setdefault("state", {})["foldserve_key"] = key
                self.admit(held, state, key, scope)
            except FoldserveError as error:
                await self.render(error)(scope, receive, send)
                return
            await super().handle(scope, receive, send)

    def admit(self, held: ExitStack, state: State, key: Key | None, scope: Scope) -> None:
        """Enters into `held` what the request occupies until it is answered; raises FoldserveError without room."""
        held.enter_context(state.foldserve_lifecycle.request())


class WorkRoute(GuardedRoute):
    """A guarded route that makes the model work: it counts towards a key's rate, and takes a place in the queue.

    It takes the place once its body is whole (`take_place`), so that a slow client keeps nobody out. It frees the place
    when the last of the answer is sent, so that the client may ask again at once, even another API process.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        with ExitStack() as places:
            scope.setdefault("state", {})[_PLACES] = places

            async def send_last(message: Message) -> None:
                if message["type"] == "http.response.body" and not message.get("more_body"):
                    places.close()
                await send(message)

            await super().handle(scope, receive, send_last)

    def admit(self, held: ExitStack, state: State, key: Key | None, scope: Scope) -> None:
        super().admit(held, state, key, scope)
        state.foldserve_guard.refuse_if_full(key)


def take_place(scope: Scope) -> None:
    """Holds a `WorkRoute` request's place until the last of its answer is sent; raises FoldserveError without room."""
    state = scope["state"]
    guard: AuthGuard = scope["app"].state.foldserve_guard
    state[_PLACES].enter_context(guard.admit(state["foldserve_key"]))


def take_further_places(scope: Scope, answers: int) -> None:
    """Holds places for the answers beyond the first; raises FoldserveError if there is no room, or can't ever be."""
    if answers:
        state = scope["state"]
        guard: AuthGuard = scope["app"].state.foldserve_guard
        state[_PLACES].enter_context(guard.admit_further(state["foldserve_key"], answers))


class MetricsRoute(GuardedRoute):
    """A route for monitoring, open until the server's end."""

    key_scope = "metrics"

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})["foldserve_quiet"] = True
        await super().handle(scope, receive, send)

    def admit(self, held: ExitStack, state: State, key: Key | None, scope: Scope) -> None:
        """Enters nothing: a scrape must not delay shutdown, nor be refused during it."""
