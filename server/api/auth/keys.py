"""API keys as a file holds them: hashed, with what each may do.

    [[key]]
    name = "alice"
    sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
    rate = "600/minute"           # optional
    concurrent = 32               # optional
    scopes = ["api", "metrics"]   # optional, ["api"] by default

A key is 256 random bits, so one round of SHA-256 is enough: slow hashes are for secrets that can be guessed.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from limits import RateLimitItem, parse
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError

Scope = Literal["api", "metrics"]

MOST_KEYS = 1000
"""Most keys in one file; each takes a slot or two of `SharedCounters`."""
_PREFIX = "fsk-"


def _parse_rate(value: object) -> RateLimitItem | None:
    if not isinstance(value, str):
        raise ValueError('a rate such as "600/minute" is needed')
    try:
        return parse(value)
    except ValueError as error:
        raise ValueError(f'a rate such as "600/minute" is needed, not {value!r}') from error


class _Entry(BaseModel):
    """One `[[key]]` of the file."""

    model_config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    rate: Annotated[RateLimitItem | None, PlainValidator(_parse_rate)] = None
    concurrent: Annotated[int | None, Field(ge=1)] = None
    scopes: list[Scope] = ["api"]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    key: list[_Entry]


@dataclass(frozen=True, slots=True)
class Key:
    """A known key.

    Attributes:
        name: of its owner, for logs.
        rate: answers per time; None for any number.
        concurrent: answers in flight; None for the server's default.
    """

    name: str
    digest: bytes
    rate: RateLimitItem | None = None
    concurrent: int | None = None
    scopes: frozenset[Scope] = frozenset({"api"})

    def cache_salt(self, chosen: str | None) -> str:
        """The salt of this key's entries in caches, which no other key can hit, whatever salt its client sends.

        The client's own `cache_salt`, `chosen`, divides the key's entries further.
        """
        return hmac.new(self.digest, f"cache_salt:{chosen or ''}".encode(), hashlib.sha256).hexdigest()


def new_key() -> str:
    return _PREFIX + secrets.token_urlsafe(32)


def key_digest(key: str) -> bytes:
    """The hash under which a key is stored."""
    return hashlib.sha256(key.encode()).digest()


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file; raises ValueError if it can't be read, or holds invalid entries."""
    try:
        entries = _File.model_validate(tomllib.loads(path.read_text(encoding="utf-8"))).key
    except OSError as error:
        raise ValueError(f"the key file {path} can't be read: {error.strerror}") from error
    except ValidationError as error:
        raise ValueError(f"the key file {path}: {_first_error(error.errors())}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"the key file {path} is not TOML: {error}") from error
    if not 1 <= len(entries) <= MOST_KEYS:
        raise ValueError(f"the key file {path} must hold 1 to {MOST_KEYS} keys, not {len(entries)}")
    for field in ("name", "sha256"):
        if len({getattr(entry, field) for entry in entries}) < len(entries):
            raise ValueError(f"the key file {path} holds two keys with the same {field}")
    return tuple(
        Key(entry.name, bytes.fromhex(entry.sha256), entry.rate, entry.concurrent, frozenset(entry.scopes))
        for entry in entries
    )


def entry(name: str, key: str, *, rate: str | None, concurrent: int | None, scopes: list[Scope]) -> str:
    """The lines for a key, to append to a key file; raises ValueError if they would not be accepted."""
    fields: dict[str, object] = {"name": name, "sha256": key_digest(key).hex(), "scopes": scopes}
    fields |= {"rate": rate} if rate is not None else {}
    fields |= {"concurrent": concurrent} if concurrent is not None else {}
    try:
        _Entry.model_validate(fields)
    except ValidationError as error:
        raise ValueError(_first_error(error.errors())) from error
    return "[[key]]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in fields.items()) + "\n"


def _first_error(errors: list[Any]) -> str:
    """The first error, without the rejected value: it may be a key pasted instead of its hash."""
    place = ".".join(str(part) for part in errors[0]["loc"])
    return f"{place}: {errors[0]['msg']}"
