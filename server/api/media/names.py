"""Resolves host names without threads, so that a silent DNS server delays only its own requests."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from contextlib import AsyncExitStack

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import AsyncResolver

_TIMEOUT_S, _TRIES = 2.0, 2  # the second try waits longer: five seconds and a half in all
_OF_A_REQUEST, _OF_A_KEY = 2, 8


class SystemResolver(AbstractResolver):
    """The DNS servers of `/etc/resolv.conf` (or `servers`) and `/etc/hosts`, through c-ares; no other sources."""

    def __init__(self, servers: Sequence[str] | None = None) -> None:
        self._servers = servers
        self._cares: AsyncResolver | None = None

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        if self._cares is None:  # it belongs to the running loop, and most requests bring no name
            self._cares = AsyncResolver(nameservers=self._servers, timeout=_TIMEOUT_S, tries=_TRIES)
        return await self._cares.resolve(host, port, family)

    async def close(self) -> None:
        if self._cares is not None:
            await self._cares.close()
            self._cares = None

    aclose = close  # for contextlib


class NameLimiter:
    """Bounds how many names are resolved at once, for one request and for one key."""

    def __init__(self, resolver: AbstractResolver) -> None:
        self._resolver = resolver
        self._of_keys: dict[str, asyncio.Semaphore] = {}  # which are few

    def of_request(self, owner: str | None) -> AbstractResolver:
        turns = [asyncio.Semaphore(_OF_A_REQUEST)]
        if owner is not None:
            turns.append(self._of_keys.setdefault(owner, asyncio.Semaphore(_OF_A_KEY)))
        return _LimitedResolver(self._resolver, turns)


class _LimitedResolver(AbstractResolver):
    def __init__(self, resolver: AbstractResolver, turns: Sequence[asyncio.Semaphore]) -> None:
        self._resolver = resolver
        self._turns = turns

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        async with AsyncExitStack() as held:
            for turn in self._turns:
                await held.enter_async_context(turn)
            return await self._resolver.resolve(host, port, family)

    async def close(self) -> None:
        """Does nothing, since the resolver is shared."""
