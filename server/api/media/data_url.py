"""`data:` URLs (RFC 2397): a media type, parameters without effect, base64 with padding."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import pybase64  # seven times as fast as the standard library, and vLLM has it already

from foldserve.server.api.errors import InvalidImage, LimitExceeded
from foldserve.server.api.media.budget import MediaBudget
from foldserve.server.engine.family import MODALITIES, Modality

_LONGEST_HEAD = 4096
_PERCENT = ord("%")
_HEX = np.array([int(chr(c), 16) if chr(c) in "0123456789abcdefABCDEF" else 255 for c in range(256)], np.uint8)

# Tokens are RFC 2045's. Parameters are read as browsers do: anything up to the next semicolon or comma, in quotes these
# too. The quantifiers are possessive, so one pass is enough for any input.
_TOKEN = r"[!#$%&'*+\-.^_`{|}~0-9a-z]++"
_VALUE = r'(?:"(?:[^"\\\x00-\x1f\x7f]|\\[^\x00-\x1f\x7f])*+"|[^";,\x00-\x1f\x7f]*+)'
_PICTURES = re.compile(r"data:video/jpe?g;", re.IGNORECASE)
_HEADS: Mapping[Modality, re.Pattern[str]] = {
    modality: re.compile(rf"data:{modality}/{_TOKEN}(?:; *+{_TOKEN}={_VALUE})*+; *+base64,", re.IGNORECASE)
    for modality in MODALITIES
}


def is_data_url(url: str) -> bool:
    return url[:5].lower() == "data:"


def is_pictures(url: str) -> bool:
    """Whether this is a video as a list of pictures: `data:video/jpeg;base64,`, then data, separated by commas."""
    return _PICTURES.match(url) is not None


def read(url: str, budget: MediaBudget, modality: Modality = "image") -> bytes:
    """The decoded bytes of a URL.

    Raises:
        InvalidImage: not of the form `data:image/TYPE;base64,DATA`, with or without parameters.
        LimitExceeded: too large.
    """
    return _decoded(url[_data(url, modality) :], budget, modality)


def read_pictures(url: str, budget: MediaBudget, most: int) -> list[bytes]:
    """The files in a list of pictures.

    Raises:
        InvalidImage: one is not base64.
        LimitExceeded: more than `most`, or too large.
    """
    data = url[_data(url, "video") :]
    count = data.count(",") + 1
    if count > most:
        raise LimitExceeded(f"the list has {count} pictures: at most {most} frames are taken of a video")
    return [_decoded(each, budget, "image") for each in data.split(",")]


def _data(url: str, modality: Modality) -> int:
    """Offset of the base64 data."""
    head = _HEADS[modality].match(url, 0, _LONGEST_HEAD)
    if head is None:
        raise InvalidImage(f"a data: URL must have the form data:{modality}/TYPE;base64,DATA")
    return head.end()


def _decoded(text: str, budget: MediaBudget, modality: Modality) -> bytes:
    try:
        data = _unescaped(text.encode("ascii"))
        budget.check_file(len(data) // 4 * 3 - data[-4:].count(b"="), modality)
        content = pybase64.b64decode(data, validate=True)
    except ValueError as error:  # binascii.Error and UnicodeEncodeError too
        raise InvalidImage("the data: URL's content is not valid base64 with padding") from error
    if not content:
        raise InvalidImage("the data: URL is empty")
    budget.spend_bytes(len(content))
    return content


def _unescaped(data: bytes) -> bytes:
    """Replaces percent escapes, in which some clients write + / =; raises ValueError for a sign without two digits.

    Uses arrays, since there may be ten million.
    """
    if _PERCENT not in data:
        return data
    values = np.frombuffer(data + b"--", np.uint8).copy()  # two more, so that a sign at the end has no digits
    at = np.flatnonzero(values == _PERCENT)
    high, low = _HEX[values[at + 1]], _HEX[values[at + 2]]
    if max(high.max(), low.max()) > 15:
        raise ValueError("a percent sign without two digits")
    values[at] = 16 * high + low
    kept = np.ones(len(values), bool)
    kept[at + 1] = kept[at + 2] = kept[-2:] = False
    return values[kept].tobytes()
