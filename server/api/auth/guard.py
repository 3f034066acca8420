"""The check of every guarded route: who asks, is it allowed, and is there room."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from limits.strategies import FixedWindowRateLimiter
from starlette.datastructures import Headers

from foldserve.server.api.auth.counters import SharedCounters
from foldserve.server.api.auth.keyring import Keyring
from foldserve.server.api.auth.keys import Key, Scope
from foldserve.server.api.errors import (
    Forbidden,
    InvalidRequest,
    TooManyAtOnce,
    TooManyRequests,
    Unauthorized,
    Unavailable,
)

_LONGEST_KEY = 512
_IN_FLIGHT = "in flight"
_SALT = re.compile(r"[A-Za-z0-9._~-]{1,128}")


class AuthGuard:
    """Checks requests before their body is read.

    Args:
        keyring: the valid keys; None lets everybody in.
        counters: shared with the other API processes.
        capacity: answers that the server works on at once, running and waiting.
        concurrent: default for keys that set no number of answers in flight; None for any number.
        open_scopes: need no key.
    """

    def __init__(
        self,
        keyring: Keyring | None,
        counters: SharedCounters,
        capacity: int,
        concurrent: int | None = None,
        open_scopes: Container[Scope] = (),
    ) -> None:
        self._keyring = keyring
        self._open_scopes = open_scopes
        self._counters = counters
        self._rates = FixedWindowRateLimiter(counters)
        self._capacity = capacity
        self._concurrent = concurrent

    def identify(self, headers: Headers, scope: Scope, header: str | None = None) -> Key | None:
        """The key that a request brings, in `Authorization` or in `header`; None if no key is needed.

        Raises:
            Unauthorized: no key, or an unknown one.
            Forbidden: the key lacks the scope.
        """
        if self._keyring is None or scope in self._open_scopes:
            return None
        key = self._keyring.find(_presented_key(headers, header))
        if key is None:
            raise Unauthorized("the API key is not valid")
        if scope not in key.scopes:
            raise Forbidden(f"this API key does not have the scope {scope!r}", scope)
        return key

    @contextmanager
    def admit(self, key: Key | None) -> Iterator[None]:
        """Holds a place for a request's first answer while it is in flight.

        Raises:
            Unavailable: the server is full.
            TooManyRequests: the key has used up its rate or its places.
        """
        with self._places(key):
            self._charge(key)
            yield

    @contextmanager
    def admit_further(self, key: Key | None, answers: int) -> Iterator[None]:
        """Holds places for the answers of a request beyond its first one.

        Raises:
            InvalidRequest: more answers than there can ever be.
            Unavailable, TooManyRequests: as for `admit`.
        """
        self._refuse_impossible(key, answers + 1)
        with self._places(key, answers):
            self._charge(key, answers)
            yield

    def refuse_if_full(self, key: Key | None) -> None:
        """Refuses a request early, before its body is sent; holds no place and does not count towards the rate.

        Raises Unavailable and TooManyRequests as `admit`.
        """
        with self._places(key):
            pass

    @contextmanager
    def _places(self, key: Key | None, number: int = 1) -> Iterator[None]:
        names = {_IN_FLIGHT: self._capacity}
        if key is not None and (most := self._concurrent_of(key)) is not None:
            names[f"in flight/{key.name}"] = most
        taken: list[str] = []
        try:
            for name, most in names.items():
                if not self._counters.take(name, most, number):
                    raise _full(key if taken else None, most)
                taken.append(name)
            yield
        finally:
            for name in taken:
                self._counters.give(name, number)

    def _refuse_impossible(self, key: Key | None, answers: int) -> None:
        bounds = [(self._capacity, "this server works on at most {} answers")]
        if key is not None and (most := self._concurrent_of(key)) is not None:
            bounds.append((most, "this API key may have {} answers in flight"))
        if key is not None and key.rate is not None:
            bounds.append((key.rate.amount, f"this API key may ask for {key.rate}, and each answer counts"))
        for most, why in bounds:
            if answers > most:
                raise InvalidRequest(f"n is {answers}, but {why.format(most)}: ask for at most {most} at once", "n")

    def _concurrent_of(self, key: Key) -> int | None:
        return self._concurrent if key.concurrent is None else key.concurrent

    def _charge(self, key: Key | None, answers: int = 1) -> None:
        if key is None or key.rate is None or self._rates.hit(key.rate, key.name, cost=answers):
            return
        wait_s = self._rates.get_window_stats(key.rate, key.name).reset_time - time.time()
        raise TooManyRequests(f"this API key may make {key.rate} requests", max(1, math.ceil(wait_s)))


@dataclass(frozen=True, slots=True)
class CacheSalts:
    """Salts that divide the prefix cache (`blocks`) and the caches of prepared and encoded images; None shares them."""

    blocks: str | None
    images: str | None


def cache_salts(key: Key | None, chosen: str | None) -> CacheSalts:
    """Each key has caches of its own. Without keys, `chosen` divides only the prefix cache, as in vLLM.

    Args:
        chosen: the client's own `cache_salt`, which divides further.

    Raises:
        InvalidRequest: `chosen` holds other characters than those of a URL.
    """
    if chosen is not None and not _SALT.fullmatch(chosen):
        raise InvalidRequest("cache_salt must be 1 to 128 letters, digits or one of ._~-", "cache_salt")
    if key is None:
        return CacheSalts(chosen, None)
    salt = key.cache_salt(chosen)
    return CacheSalts(salt, salt)


def _presented_key(headers: Headers, header: str | None) -> str:
    """The bearer token (RFC 6750, section 2.1) or the value of `header`; raises Unauthorized unless just one came."""
    sent = headers.getlist("authorization")
    plain = [] if header is None else headers.getlist(header)
    if not sent and not plain:
        raise Unauthorized("an API key is needed: send the header `Authorization: Bearer KEY`", sent=False)
    if len(sent) + len(plain) > 1:
        raise Unauthorized(f"more than one header {'Authorization' if not plain else 'with a key'} came")
    if plain:
        token = plain[0]
    else:
        scheme, _, token = sent[0].partition(" ")
        if scheme.lower() != "bearer":
            raise Unauthorized("only the scheme Bearer is known: send the header `Authorization: Bearer KEY`")
    token = token.strip(" ")
    if not 0 < len(token) <= _LONGEST_KEY:
        raise Unauthorized("the API key is not valid")
    return token


def _full(key: Key | None, most: int) -> Exception:
    if key is None:
        return Unavailable("the server has too much to do: try again later")
    return TooManyAtOnce(f"this API key may have {most} answers in flight")
