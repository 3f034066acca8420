"""Fetches images and videos by HTTP. Resolves names once, and connects only to addresses that passed the check."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from foldserve.server.api.codings import compression
from foldserve.server.api.errors import ImageUnavailable, InvalidImage, RefusedUrl
from foldserve.server.api.media.address import HostPolicy, join
from foldserve.server.api.media.budget import MediaBudget
from foldserve.server.api.media.names import SystemResolver
from foldserve.server.engine.family import Modality

_CHUNK_BYTES = 1 << 16
_REDIRECTS = (301, 302, 303, 307, 308)
_HEADERS = {"Accept-Encoding": "identity", "User-Agent": "foldserve"}


class CheckedResolver(AbstractResolver):
    """Resolves a name, and refuses it if any of its addresses may not be asked.

    Any, not all: an answer that mixes public and private addresses is an attack or a mistake. `permitted` collects the
    addresses that passed. The default resolver is the system's.
    """

    def __init__(self, policy: HostPolicy, resolver: AbstractResolver | None = None) -> None:
        self._policy = policy
        self._resolver = resolver or SystemResolver()
        self.permitted: set[str] = set()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._resolver.resolve(host, port, family)
        if not all(self._policy.permits(host, entry["host"]) for entry in found):
            raise RefusedUrl("images may not be fetched from this host: its address is not on the public internet")
        self.permitted.update(entry["host"] for entry in found)
        return found

    async def close(self) -> None:
        await self._resolver.close()

    aclose = close  # for contextlib


class Fetcher:
    """Fetches the files of one request. Made by `open_fetcher`.

    `session` must have no redirects, decompression, cookies or proxies of its own.
    """

    def __init__(self, session: aiohttp.ClientSession, policy: HostPolicy, budget: MediaBudget) -> None:
        self._session = session
        self._policy = policy
        self._budget = budget

    async def get(self, url: str, modality: Modality = "image") -> bytes:
        """The file behind a URL.

        Raises:
            RefusedUrl: the URL, or one that it redirects to, may not be asked.
            ImageUnavailable: no answer, or not a whole file.
            LimitExceeded: too large.
        """
        most = self._budget.limits.max_media_redirects
        for redirects in range(most + 1):
            with _blaming_redirect(redirects):
                target = self._policy.check(url)
                found = await self._ask(target, modality)
            if isinstance(found, bytes):
                return found
            with _blaming_redirect(redirects + 1):
                url = join(target, found)
        raise ImageUnavailable(f"the image's server redirects more than {most} times")

    async def _ask(self, target: URL, modality: Modality) -> bytes | str:
        """The file, or the location of a redirect."""
        try:
            headers = {"Accept": f"{modality}/*", **_HEADERS}
            async with self._session.get(target, headers=headers, allow_redirects=False) as response:
                if response.status not in _REDIRECTS:
                    return await self._read(response, modality)
                location = response.headers.get("Location")
        except (aiohttp.ClientError, OSError, ValueError) as error:  # ValueError: a host that IDNA can't encode
            raise ImageUnavailable(_reason(error)) from error
        if not location:
            raise ImageUnavailable("the image's server redirects to nowhere")
        return location

    async def _read(self, response: aiohttp.ClientResponse, modality: Modality) -> bytes:
        if response.status != 200:
            raise ImageUnavailable(f"the image's server answered with status {response.status}")
        if compression(response.headers.getall("Content-Encoding", [])):
            raise InvalidImage("the image's server sent it compressed, which was not asked for")
        self._budget.check_file(response.content_length or 0, modality)
        content = bytearray()
        async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
            self._budget.spend_bytes(len(chunk))
            content += chunk
            if len(content) > self._budget.most_bytes(modality):
                self._budget.check_file(len(content), modality)
        if not content:
            raise InvalidImage("the image's server sent an empty file")
        return bytes(content)


@asynccontextmanager
async def open_fetcher(
    policy: HostPolicy, budget: MediaBudget, names: AbstractResolver | None = None
) -> AsyncIterator[Fetcher]:
    """A fetcher whose connections end with the request, so that users share none."""

    resolver = CheckedResolver(policy, names)

    def checked_socket(info: Any) -> socket.socket:
        """Checks the address itself again, since every connection comes through here."""
        family, kind, protocol, _, (address, *_) = info
        if address not in resolver.permitted and not policy.permits(address, address):
            raise PermissionError("not a permitted address")
        return socket.socket(family, kind, protocol)

    connector = aiohttp.TCPConnector(resolver=resolver, socket_factory=checked_socket)
    async with (
        aclosing(resolver),
        aiohttp.ClientSession(
            connector=connector,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),  # the guard's own limit covers all images
            trust_env=False,
        ) as session,
    ):
        yield Fetcher(session, policy, budget)


@contextmanager
def _blaming_redirect(redirects: int) -> Iterator[None]:
    """Makes errors say that they are about a redirect, unless they are about the request's own URL."""
    try:
        yield
    except (RefusedUrl, ImageUnavailable) as error:
        if not redirects:
            raise
        raise type(error)(f"at the target of the redirect: {error}") from error


def _reason(error: Exception) -> str:
    """The fault in our own words, since those of the libraries name addresses."""
    if isinstance(error, aiohttp.ClientSSLError):
        return "the image's server has no valid TLS certificate for its host name"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "the host of the image's URL was not found"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "no connection to the image's server"
    if isinstance(error, aiohttp.ClientPayloadError):
        return "the image's server broke off before the whole file had come"
    return "the image's server gave no valid HTTP answer"
