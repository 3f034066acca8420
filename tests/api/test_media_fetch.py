"""Fetching from a web server that misbehaves."""

from __future__ import annotations

import asyncio
import base64
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from foldserve.server.api.errors import (
    FoldserveError,
    ImageUnavailable,
    InvalidImage,
    LimitExceeded,
    RefusedUrl,
    Unavailable,
)
from foldserve.server.api.media.address import HostPolicy, join
from foldserve.server.api.media.budget import MediaBudget
from foldserve.server.api.media.decode import ImageFile
from foldserve.server.api.media.fetch import CheckedResolver, open_fetcher
from foldserve.server.api.media.guard import MediaGuard
from foldserve.server.api.media.pixel_memory import PixelMemory
from foldserve.server.limits import Limits
from tests.api.hostile import HOST, PHOTO, Handler, hostile_server
from tests.images import data_uri, photo

POLICY = HostPolicy(private_hosts={HOST})


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    with hostile_server() as url:
        yield url


def get(url: str, policy: HostPolicy = POLICY, budget: MediaBudget | None = None) -> bytes:
    async def run() -> bytes:
        async with open_fetcher(policy, budget or MediaBudget(Limits())) as fetcher:
            return await fetcher.get(url)

    return asyncio.run(run())


def fails(error: type[FoldserveError], url: str, message: str, **options: Any) -> None:
    with pytest.raises(error, match=message) as caught:
        get(url, **options)
    assert "127.0.0" not in str(caught.value)


def test_a_photo(web: str) -> None:
    budget = MediaBudget(Limits())
    assert get(f"{web}/photo", budget=budget) == PHOTO
    assert budget.bytes_used == len(PHOTO)


def test_redirects_are_followed_within_the_same_bounds(web: str) -> None:
    assert get(f"{web}/relative") == PHOTO
    assert get(f"{web}/redirect/{web}/relative") == PHOTO
    fails(ImageUnavailable, f"{web}/loop", "more than 3 times")
    fails(ImageUnavailable, f"{web}/relative", "more than 0 times", budget=MediaBudget(Limits(max_media_redirects=0)))
    fails(ImageUnavailable, f"{web}/nowhere", "to nowhere")


@pytest.mark.parametrize(
    "target",
    [
        "http://127.0.0.1:1/x",
        "http://localhost:1/x",
        "http://[::1]:1/x",
        "http://169.254.169.254/latest/meta-data",
        "http://2130706433/x",
        "http://user@127.0.0.2/x",
        "file:///etc/passwd",
        "ftp://example.com/x",
        "gopher://127.0.0.1:6379/_FLUSHALL",
        "data:image/png;base64,AA==",
        "//127.0.0.1/x",
    ],
)
def test_redirects_to_what_is_refused(web: str, target: str) -> None:
    fails(RefusedUrl, f"{web}/redirect/{target}", "URL|fetched from")


@pytest.mark.parametrize(
    ("location", "asked"),
    [
        ("/at/holiday photos/scene 1.png", "/at/holiday%20photos/scene%201.png"),
        ("/at/a%20b c.png?x=1 2&y=%2F", "/at/a%20b%20c.png?x=1%202&y=%2F"),
        ("/at/f\u00eate/\u5199\u771f.png", "/at/f%C3%AAte/%E5%86%99%E7%9C%9F.png"),
        ("/at/a.png#top", "/at/a.png"),
        ("/at/a.png#a b", "/at/a.png"),
        ("../at/a.png", "/at/a.png"),
        ("a.png", "/location/a.png"),
        ("?a=b c", None),
        ("//HOST/at/a b.png", "/at/a%20b.png"),
        ("http://HOST/at/\u00e4 b.png", "/at/%C3%A4%20b.png"),
        ("HTTP://HOST/at/sig%7E%2f~", "/at/sig%7E%2f~"),
    ],
)
def test_locations_as_servers_write_them(web: str, location: str, asked: str | None) -> None:
    Handler.asked.clear()
    raw = location.replace("HOST", web.removeprefix("http://")).encode()
    if asked is None or asked == "/location/a.png":  # these lead back to what redirects
        with pytest.raises(FoldserveError):
            get(f"{web}/location/{raw.hex()}")
        return
    assert get(f"{web}/location/{raw.hex()}") == PHOTO
    assert Handler.asked[1:] == [asked]


def test_a_location_in_latin_1(web: str) -> None:
    Handler.asked.clear()
    assert get(f"{web}/location/{'/at/fête.png'.encode('latin-1').hex()}") == PHOTO
    assert Handler.asked[1:] == ["/at/f%EAte.png"]


@pytest.mark.parametrize(
    ("location", "error", "message"),
    [
        ("", ImageUnavailable, "^the image's server redirects to nowhere"),
        ("http://exa mple.com/", RefusedUrl, "^at the target of the redirect: the URL holds a space"),
        ("/a\\b", RefusedUrl, "^at the target of the redirect: the URL holds a space, a backslash"),
        ("http://10.0.0.1/", RefusedUrl, "^at the target of the redirect: images may not be fetched"),
        ("http://localhost:1/", RefusedUrl, "^at the target of the redirect: images may not be fetched"),
        ("ftp://example.com/", RefusedUrl, "^at the target of the redirect: an image's URL must begin"),
        ("http://no-such-host.invalid/", ImageUnavailable, "^at the target of the redirect: the host"),
        ("/status/404", ImageUnavailable, "^at the target of the redirect: .* status 404"),
        ("/at/" + " " * 4000 + "x", RefusedUrl, "^at the target of the redirect: the URL has 12005 characters"),
        ("http://[::1", RefusedUrl, "^at the target of the redirect: this is not a valid URL"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_errors_name_the_redirect(web: str, location: str, error: type[FoldserveError], message: str) -> None:
    fails(error, f"{web}/location/{location.encode().hex()}", message)


def test_errors_of_the_url_itself_name_no_redirect(web: str) -> None:
    fails(ImageUnavailable, f"{web}/status/404", "^the image's server answered with status 404")
    fails(RefusedUrl, "http://10.0.0.1/", "^images may not be fetched")


@given(st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=30))
def test_any_location_leads_to_an_ascii_url_or_our_error(location: str) -> None:
    try:
        joined = join(URL("http://example.com/a/b?c"), location)
        HostPolicy().check(joined)
    except RefusedUrl:
        return
    assert joined.isascii() and " " not in joined


def test_redirects_leave_the_domains_of_the_operator(web: str) -> None:
    policy = HostPolicy(domains={HOST}, private_hosts={HOST, "127.0.0.1"})
    assert get(f"{web}/photo", policy) == PHOTO
    fails(RefusedUrl, f"{web}/redirect/http://127.0.0.1:1/x", "media domains", policy=policy)


def test_loopback_is_refused_without_being_asked(web: str) -> None:
    Handler.asked.clear()
    fails(RefusedUrl, f"{web}/photo", "public internet", policy=HostPolicy())
    port = web.rpartition(":")[2]
    for host in ("localhost", "LOCALHOST"):
        fails(RefusedUrl, f"http://{host}:{port}/photo", "public internet")
    assert Handler.asked == []


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("status/404", ImageUnavailable, "status 404"),
        ("status/500", ImageUnavailable, "status 500"),
        ("status/206", ImageUnavailable, "status 206"),
        ("empty", InvalidImage, "empty"),
        ("gzip", InvalidImage, "compressed"),
        ("announced", LimitExceeded, "larger than 20 MB"),
        ("endless", LimitExceeded, "larger than 20 MB"),
        ("short", ImageUnavailable, "broke off"),
        ("garbage", ImageUnavailable, "no valid HTTP answer"),
    ],
)
def test_bad_answers(web: str, path: str, error: type[FoldserveError], message: str) -> None:
    fails(error, f"{web}/{path}", message)


@pytest.mark.parametrize(
    "codings",
    [
        "",
        "identity",
        "aws-chunked",
        "AWS-Chunked,identity",
        "utf-8",
        "none",
        "binary",
        "base64, x",
        ",",
        "gzipped",
        "\n",
    ],
)
def test_codings_that_do_not_compress(web: str, codings: str) -> None:
    assert get(f"{web}/coded/{codings.encode().hex()}") == PHOTO


@pytest.mark.parametrize(
    "codings",
    [
        *("gzip", "GZIP", "x-gzip", "deflate", "br", "zstd", "compress", "x-compress"),
        *("aws-chunked, gzip", "Br,identity", "identity\ngzip", ",deflate ,", "aws-chunked\nutf-8,  zstd"),
    ],
)
def test_codings_that_compress(web: str, codings: str) -> None:
    fails(InvalidImage, f"{web}/coded/{codings.encode().hex()}", "compressed")


def test_no_tls_and_no_server(web: str) -> None:
    fails(ImageUnavailable, web.replace("http:", "https:") + "/photo", "TLS")
    with socket.socket() as unused:
        unused.bind((HOST, 0))
        fails(ImageUnavailable, f"http://{HOST}:{unused.getsockname()[1]}/x", "no connection")
    fails(ImageUnavailable, "http://no-such-host.invalid/x", "not found")


def test_the_budget_is_the_requests(web: str) -> None:
    budget = MediaBudget(Limits(max_image_mb=len(PHOTO) / 1e6, max_media_mb=1.5 * len(PHOTO) / 1e6))
    assert get(f"{web}/photo", budget=budget) == PHOTO
    fails(LimitExceeded, f"{web}/photo", "together", budget=budget)


class Answers(AbstractResolver):
    """A name server that answers as it is told, and counts."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = list(answers)
        self.asked = 0

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        self.asked += 1
        return [
            ResolveResult(hostname=host, host=address, port=port, family=socket.AF_INET, proto=0, flags=0)
            for address in self.answers.pop(0)
        ]

    async def close(self) -> None:
        pass


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["8.8.8.8", "10.0.0.1"], ["::ffff:127.0.0.1"], ["fe80::1%eth0"]])
def test_names_with_a_private_address(addresses: list[str]) -> None:
    resolver = CheckedResolver(HostPolicy(), Answers(addresses))
    with pytest.raises(RefusedUrl):
        asyncio.run(resolver.resolve("rebind.example", 80))
    assert not resolver.permitted


def test_rebinding(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is public when first asked and private after that is asked once: the checked answer is used."""
    answers = Answers([HOST], ["127.0.0.1"])
    monkeypatch.setattr("foldserve.server.api.media.fetch.SystemResolver", lambda: answers)
    policy = HostPolicy(private_hosts={"rebind.example"})
    assert get(web.replace(HOST, "rebind.example") + "/photo", policy) == PHOTO
    assert answers.asked == 1


def test_the_socket_itself_is_checked(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were URL and resolver checks to miss one, the address is looked at again where the connection is opened."""
    monkeypatch.setattr(HostPolicy, "check", lambda self, text: __import__("yarl").URL(text))
    Handler.asked.clear()
    fails(ImageUnavailable, f"{web}/photo", "no connection", policy=HostPolicy())
    assert Handler.asked == []


def load(limits: Limits, *urls: str) -> list[Any]:
    content: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    messages = [{"role": "user", "content": iter(content)}]  # as pydantic gives it

    async def run() -> list[Any]:
        async with MediaGuard(limits).loaded(messages):
            return [replace(part["image_pil"]) for part in messages[0]["content"]]

    images = asyncio.run(run())
    assert all(part == {"type": "image_url", "image_url": {"url": ""}} for part in messages[0]["content"])
    return images


@pytest.mark.parametrize("path", ["drip", "silent"])
def test_slow_servers_cost_seconds_only(web: str, path: str) -> None:
    limits = Limits(max_media_seconds=0.5, allow_media_private_host=(HOST,))
    with pytest.raises(ImageUnavailable, match=r"within 0\.5 s"):
        load(limits, f"{web}/photo", f"{web}/{path}")


def test_images_come_back_in_order_with_their_paths(web: str) -> None:
    limits = Limits(allow_media_private_host=(HOST,))
    images = load(limits, f"{web}/photo", data_uri(photo(3)), f"{web}/relative")
    assert [image.media.mode for image in images] == ["RGB"] * 3
    assert images[0].original_bytes == images[2].original_bytes == PHOTO != images[1].original_bytes
    with pytest.raises(ImageUnavailable) as caught:
        load(limits, data_uri(photo(3)), f"{web}/status/404", f"{web}/silent")
    assert caught.value.param == "messages[0].content[1].image_url.url"


def test_a_damaged_image_is_named() -> None:
    """Its header is sound, so that only decoding finds it out; what was decoded beside it is dropped."""
    cut = "data:image/jpeg;base64," + base64.b64encode(PHOTO[: len(PHOTO) // 2]).decode()
    with pytest.raises(InvalidImage, match="cut short") as caught:
        load(Limits(), data_uri(photo(3)), cut)
    assert caught.value.param == "messages[0].content[1].image_url.url"


def test_decoding_has_a_bound_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "decode", lambda *args: time.sleep(1))
    with pytest.raises(ImageUnavailable, match=r"decoded within 0\.2 s"):
        load(Limits(max_media_seconds=0.2), data_uri(photo(3)))


@pytest.mark.parametrize("patient", [True, False])
def test_pixels_of_all_requests_have_a_bound(patient: bool) -> None:
    """Three images of which two fit at once: the third waits, or is told to come later."""
    limits = Limits(max_image_megapixels=0.1, max_media_megapixels=0.1, max_prepared_megapixels=0.2)
    entered: list[int] = []

    async def hold(guard: MediaGuard, number: int, done: asyncio.Event) -> None:
        message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_uri(photo(number))}}]}
        async with guard.loaded([message]):
            entered.append(number)
            await done.wait()

    async def run() -> None:
        guard = MediaGuard(limits)
        guard._memory = PixelMemory(limits.max_prepared_pixels, 60 if patient else 0.2)
        done = asyncio.Event()
        tasks = [asyncio.create_task(hold(guard, number, done)) for number in range(2)]
        while len(entered) < 2:
            await asyncio.sleep(0.01)
        third = asyncio.create_task(hold(guard, 2, done))
        if patient:
            await asyncio.sleep(0.2)
            assert 2 not in entered
            tasks.append(third)
        else:
            with pytest.raises(Unavailable, match="too many images"):
                await third
        done.set()
        await asyncio.gather(*tasks)

    asyncio.run(run())
    assert sorted(entered) == ([0, 1, 2] if patient else [0, 1])


@pytest.mark.parametrize(("images", "visits"), [(1, 1), (2, 4)])
def test_one_image_takes_one_visit_to_a_thread(images: int, visits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    run = MediaGuard._run

    async def counted(self: MediaGuard, function: Any, *args: Any) -> Any:
        made.append(function)
        return await run(self, function, *args)

    monkeypatch.setattr(MediaGuard, "_run", counted)
    assert len(load(Limits(), *map(data_uri, map(photo, range(images))))) == images
    assert len(made) == visits


def test_a_request_that_ended_while_its_image_was_read_holds_no_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = ImageFile.open

    def slowly(content: bytes) -> ImageFile:
        time.sleep(0.3)
        return opened(content)

    monkeypatch.setattr(ImageFile, "open", slowly)

    async def run() -> None:
        guard = MediaGuard(Limits())
        free = guard._memory._free
        part = {"type": "image_url", "image_url": {"url": data_uri(photo(1))}}

        async def one(message: dict[str, Any]) -> None:
            async with guard.loaded([message]):
                assert guard._memory._free < free

        gone = asyncio.create_task(one({"role": "user", "content": [part]}))
        await asyncio.sleep(0.1)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        await one({"role": "user", "content": [part]})
        guard._threads.pool.shutdown()
        assert guard._memory._free == free

    asyncio.run(run())
