"""The currently valid keys: the file is read again when it changes."""

from __future__ import annotations

import hmac
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from foldserve.server.api.auth.keys import Key, key_digest, read_keys

_LOOK_EVERY_S = 1.0
_log = logging.getLogger(__name__)


class Keyring:
    """Keys of a file, reloaded within a second of a change; a file that has become invalid changes nothing.

    Raises ValueError if the file is invalid at the start.
    """

    def __init__(self, path: Path, now: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._now = now
        self._version = _version(path)
        self._keys = read_keys(path)
        self._next_look = now() + _LOOK_EVERY_S

    def find(self, presented: str) -> Key | None:
        """The key whose hash is that of `presented`; always compares all of them, in constant time."""
        self._reload_if_changed()
        wanted = key_digest(presented)
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, wanted):
                found = key
        return found

    def _reload_if_changed(self) -> None:
        now = self._now()
        if now < self._next_look:
            return
        self._next_look = now + _LOOK_EVERY_S
        version = _version(self._path)
        if version == self._version:
            return
        self._version = version
        try:
            self._keys = read_keys(self._path)
            _log.info("read %d API keys anew", len(self._keys))
        except ValueError as error:
            _log.error("the API keys stay as they were: %s", error)


def _version(path: Path) -> tuple[int, ...] | None:
    """A value that changes with the file; None while there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return (status.st_mtime_ns, status.st_size, status.st_ino)
