"""The checks of a guarded route, in an application without a model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from http import HTTPStatus
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import StreamingResponse
from limits import parse
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from foldserve.server.api.auth.counters import SharedCounters
from foldserve.server.api.auth.guard import AuthGuard, CacheSalts, cache_salts
from foldserve.server.api.auth.keys import Key, key_digest
from foldserve.server.api.auth.route import GuardedRoute, MetricsRoute, OpenRoute, WorkRoute, take_place
from foldserve.server.api.errors import Forbidden, InvalidRequest, TooManyRequests, Unauthorized, Unavailable

ALICE = Key("alice", key_digest("key-of-alice"))
BOB = Key("bob", key_digest("key-of-bob"), scopes=frozenset({"metrics"}))


class Ring:
    """The two keys above."""

    def find(self, presented: str) -> Key | None:
        return next((key for key in (ALICE, BOB) if key.digest == key_digest(presented)), None)


def guard(capacity: int = 10, **options: Any) -> AuthGuard:
    return AuthGuard(Ring(), SharedCounters(), capacity, **options)  # type: ignore[arg-type]


def headers(*values: str) -> Headers:
    return Headers(raw=[(b"authorization", value.encode("latin-1")) for value in values])


@pytest.mark.parametrize("value", ["Bearer key-of-alice", "bearer key-of-alice", "BEARER  key-of-alice "])
def test_a_known_key(value: str) -> None:
    assert guard().identify(headers(value), "api") is ALICE


@pytest.mark.parametrize(
    "values",
    [
        (),
        ("",),
        ("Bearer",),
        ("Bearer ",),
        ("Bearer wrong",),
        ("Bearer key-of-alice2",),
        ("Bearer key-of-alic",),
        ("Bearer KEY-OF-ALICE",),
        ("Bearer key-of-alice, key-of-alice",),
        ("Bearer \tkey-of-alice",),
        ("Bearer " + "k" * 100_000,),
        ("Bearer key\xe9",),
        ("Basic key-of-alice",),
        ("Basic a2V5LW9mLWFsaWNlOg==",),
        ("key-of-alice",),
        ("Token key-of-alice",),
        ("Bearer wrong", "Bearer key-of-alice"),
        ("Bearer key-of-alice", "Bearer key-of-alice"),
    ],
    ids=lambda values: " + ".join(values)[:30] or "none",
)
def test_no_known_key(values: tuple[str, ...]) -> None:
    with pytest.raises(Unauthorized) as caught:
        guard().identify(headers(*values), "api")
    assert caught.value.headers["WWW-Authenticate"].startswith('Bearer realm="foldserve"')
    assert ("invalid_token" in caught.value.headers["WWW-Authenticate"]) == bool(values)
    assert "alice" not in str(caught.value)


def test_scopes() -> None:
    with pytest.raises(Forbidden) as caught:
        guard().identify(headers("Bearer key-of-bob"), "api")
    assert 'scope="api"' in caught.value.headers["WWW-Authenticate"]
    with pytest.raises(Forbidden):
        guard().identify(headers("Bearer key-of-alice"), "metrics")
    assert guard().identify(headers("Bearer key-of-bob"), "metrics") is BOB
    assert guard(open_scopes=("metrics",)).identify(headers(), "metrics") is None


def test_without_keys_everybody_may() -> None:
    assert AuthGuard(None, SharedCounters(), 1).identify(headers("Bearer whatever"), "api") is None


def test_a_full_server() -> None:
    full = guard(capacity=2)
    with full.admit(None), full.admit(ALICE):
        with pytest.raises(Unavailable) as caught, full.admit(None):
            pass
        assert caught.value.headers["Retry-After"] == "1"
    with full.admit(None), full.admit(None):
        pass


def test_places_of_a_key() -> None:
    few = Key("few", b"", concurrent=1)
    checked = guard()
    with checked.admit(few):
        with pytest.raises(TooManyRequests) as caught, checked.admit(few):
            pass
        assert caught.value.code == "concurrency_limit_exceeded"
        with checked.admit(ALICE):
            pass
    with checked.admit(few):
        pass


def test_rate_of_a_key() -> None:
    slow = Key("slow", b"", rate=parse("2/hour"))
    checked = guard(capacity=1)
    for _ in range(2):
        with checked.admit(slow):
            pass
    with pytest.raises(TooManyRequests) as caught, checked.admit(slow):
        pass
    assert caught.value.code == "rate_limit_exceeded"
    assert 3500 < int(caught.value.headers["Retry-After"]) <= 3600
    with checked.admit(ALICE):
        pass  # the place of the refused one is free again


def test_further_answers_take_places_too() -> None:
    checked = guard(capacity=8)
    with checked.admit(ALICE), checked.admit_further(ALICE, 6):
        with checked.admit(BOB), pytest.raises(Unavailable), checked.admit_further(BOB, 1):
            pass
        with checked.admit(BOB):
            pass  # those that were refused hold nothing
    with checked.admit(ALICE), checked.admit_further(ALICE, 7):
        pass


def test_further_answers_count_for_a_key() -> None:
    few, checked = Key("few", b"", concurrent=4), guard()
    with checked.admit(few), checked.admit_further(few, 2):
        with checked.admit(few), pytest.raises(TooManyRequests) as caught, checked.admit_further(few, 1):
            pass
        assert caught.value.code == "concurrency_limit_exceeded"
    slow = Key("slow", b"", rate=parse("6/hour"))
    with checked.admit(slow), checked.admit_further(slow, 4):
        pass
    with checked.admit(slow), pytest.raises(TooManyRequests) as caught, checked.admit_further(slow, 1):
        pass
    assert caught.value.code == "rate_limit_exceeded"


@pytest.mark.parametrize(
    ("key", "options", "most"),
    [
        (None, {"capacity": 3}, 3),
        (ALICE, {"concurrent": 3}, 3),
        (Key("few", b"", concurrent=2), {"concurrent": 3}, 2),
        (Key("slow", b"", rate=parse("3/minute")), {}, 3),
    ],
    ids=["server", "default", "key", "rate"],
)
def test_more_answers_than_there_can_ever_be(key: Key | None, options: dict[str, int], most: int) -> None:
    """Waiting would not help: it is said what to change."""
    with guard(**options).admit_further(key, most - 1):
        pass
    checked = guard(**options)
    what = f"n is {most + 1}, but .* ask for at most {most} at once"
    with checked.admit(key), pytest.raises(InvalidRequest, match=what) as caught, checked.admit_further(key, most):
        pass
    assert caught.value.param == "n"


def test_each_key_has_a_bound() -> None:
    checked = guard(concurrent=1)
    with checked.admit(ALICE):
        with pytest.raises(TooManyRequests), checked.admit(ALICE):
            pass
        with checked.admit(BOB), checked.admit(None), checked.admit(None):
            pass


@pytest.mark.parametrize("salt", ["", "a b", "a/b", "a@b", "é", "a\0", "x" * 129, "a\n"])
def test_a_salt_of_other_characters(salt: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        cache_salts(ALICE, salt)
    assert caught.value.param == "cache_salt"


def test_without_keys_images_are_shared_and_the_salt_of_blocks_is_the_clients() -> None:
    assert cache_salts(None, None) == CacheSalts(blocks=None, images=None)
    assert cache_salts(None, "mine") == CacheSalts(blocks="mine", images=None)


@pytest.mark.parametrize("chosen", [None, "mine"])
def test_a_key_has_its_own_blocks_and_images(chosen: str | None) -> None:
    salt = ALICE.cache_salt(chosen)
    assert cache_salts(ALICE, chosen) == CacheSalts(blocks=salt, images=salt)


class Lives:
    """A life cycle that is always ready, or never."""

    def __init__(self, refusal: Exception | None = None) -> None:
        self.refusal = refusal
        self.held = 0

    def request(self) -> Lives:
        if self.refusal:
            raise self.refusal
        return self

    def __enter__(self) -> None:
        self.held += 1

    def __exit__(self, *_: object) -> None:
        self.held -= 1

    def explain(self, error: Exception) -> Exception:
        return error


def application(lifecycle: Lives, **options: Any) -> FastAPI:
    app = FastAPI()
    app.state.foldserve_guard = guard(**options)
    app.state.foldserve_lifecycle = lifecycle
    kinds = {"/open": OpenRoute, "/guarded": GuardedRoute, "/work": WorkRoute, "/metrics": MetricsRoute}
    for path, kind in kinds.items():
        router = APIRouter(route_class=kind)

        @router.post(path)
        async def answer(body: dict[str, Any], raw_request: Request) -> dict[str, Any]:
            return {"held": lifecycle.held, "key": getattr(raw_request.state, "foldserve_key", None) and "known"}

        app.include_router(router)
    return app


@pytest.mark.parametrize("fails", [False, True], ids=["answered", "refused"])
def test_who_has_the_whole_answer_may_ask_again(fails: bool) -> None:
    """The server has one place, which is free when the last bytes are on their way."""
    app, checked, free = FastAPI(), guard(capacity=1), list[bool]()
    app.state.foldserve_guard, app.state.foldserve_lifecycle = checked, Lives()
    app.router.route_class = WorkRoute

    def is_free() -> bool:
        try:
            with checked.admit(ALICE):
                return True
        except Unavailable:
            return False

    async def parts() -> AsyncIterator[str]:
        for part in "abc":
            yield part

    @app.post("/work")
    async def answer(raw_request: Request) -> StreamingResponse:
        take_place(raw_request.scope)
        if fails:
            raise InvalidRequest("no")
        return StreamingResponse(parts())

    async def watched(scope: Scope, receive: Receive, send: Send) -> None:
        async def note(message: Message) -> None:
            if message["type"] == "http.response.body":
                free.append(is_free())
            await send(message)

        await app(scope, receive, note)

    async def post() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(watched), base_url="http://server") as client:
            return await client.post("/work", headers={"authorization": "Bearer key-of-alice"})

    assert asyncio.run(post()).status_code == (400 if fails else 200)
    assert free == ([True] if fails else [False, False, False, True])


Ask = Callable[..., Awaitable[httpx.Response]]


def ask(app: FastAPI, path: str, **headers: str) -> httpx.Response:
    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.post(path, json={}, headers=headers)

    return asyncio.run(post())


def test_routes() -> None:
    lifecycle = Lives()
    app = application(lifecycle)
    assert ask(app, "/open").json() == {"held": 0, "key": None}
    refused = ask(app, "/guarded")
    assert refused.status_code == HTTPStatus.UNAUTHORIZED
    assert set(refused.json()["error"]) == {"message", "type", "param", "code"}
    for path in ("/guarded", "/work"):
        assert ask(app, path, authorization="Bearer key-of-alice").json() == {"held": 1, "key": "known"}
    assert ask(app, "/metrics", authorization="Bearer key-of-bob").json() == {"held": 0, "key": "known"}
    assert ask(app, "/metrics", authorization="Bearer key-of-alice").status_code == HTTPStatus.FORBIDDEN
    assert lifecycle.held == 0


def test_the_end_is_for_those_with_a_key_only() -> None:
    app = application(Lives(Unavailable("going", 7)), open_scopes=("metrics",))
    assert ask(app, "/guarded").status_code == HTTPStatus.UNAUTHORIZED
    refused = ask(app, "/guarded", authorization="Bearer key-of-alice")
    assert (refused.status_code, refused.headers["Retry-After"]) == (HTTPStatus.SERVICE_UNAVAILABLE, "7")
    assert ask(app, "/metrics").status_code == HTTPStatus.OK


@pytest.mark.parametrize("path", ["/guarded", "/work", "/metrics"])
@pytest.mark.parametrize("method", ["POST", "GET"])
def test_a_stranger_is_refused_before_the_body_is_read(path: str, method: str) -> None:
    app = application(Lives())
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("the body was asked for")

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": [(b"host", b"x/open")], "query_string": b""}
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == HTTPStatus.UNAUTHORIZED
