"""`data:` URLs: every spelling of RFC 2397 is read, everything else is refused, and neither takes long."""

from __future__ import annotations

import base64
import time
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foldserve.server.api.errors import InvalidImage, LimitExceeded
from foldserve.server.api.media import data_url
from foldserve.server.api.media.budget import MediaBudget
from foldserve.server.limits import Limits
from tests.api.test_media_decode import data


@pytest.mark.parametrize(
    "url",
    [data(b"x"), data(b"xy", "image/svg+xml"), data(b"xyz", "image/png;name=a.png"), data(b"x").replace("d", "D", 1)],
)
def test_data_urls(url: str) -> None:
    budget = MediaBudget(Limits())
    assert data_url.is_data_url(url)
    content = data_url.read(url, budget)
    assert b"xyz".startswith(content) and len(content) == budget.bytes_used


@pytest.mark.parametrize(
    "url",
    [
        "data:",
        "data:,",
        "data:image/png;base64",
        "data:image/png;base64,",
        "data:image/png,abcd",
        "data:;base64,AAAA",
        "data:text/html;base64,AAAA",
        "data:text/html,<script>",
        "data:image/png;base64;base64,AAAA",
        "data:image/png;base64,A",
        "data:image/png;base64,AA",
        "data:image/png;base64,AA=",
        "data:image/png;base64,AAA=A",
        "data:image/png;base64,AAAA====",
        "data:image/png;base64,AA AA",
        "data:image/png;base64,AAAA\n",
        "data:image/png;base64,AA%3D%3",
        "data:image/png;base64,AA%3D%%3D",
        "data:image/png;base64,AAA%25",
        "data:image/png;base64,AAA%GG",
        "data:image/png;base64,AA%3D%3D%",
        'data:image/png;name="a;base64,AAAA',
        "data:image/png;=a;base64,AAAA",
        "data:image/png;a b=c;base64,AAAA",
        "data:image/png;name=a\nb;base64,AAAA",
        "data:image/;base64,AAAA",
        "data:image/png;base64,-_-_",
        "data:image/png;base64,ÄÄÄÄ",
        "data:image/" + "x" * 100_000 + ";base64,AAAA",
    ],
    ids=lambda url: ascii(url)[:50],
)
def test_bad_data_urls(url: str) -> None:
    with pytest.raises(InvalidImage, match="data: URL"):
        data_url.read(url, MediaBudget(Limits()))


def test_data_urls_are_measured_before_they_are_decoded() -> None:
    limits = Limits(max_image_mb=0.003)
    assert len(data_url.read(data(bytes(3000)), MediaBudget(limits))) == 3000
    with pytest.raises(LimitExceeded, match=r"0\.003 MB"):
        data_url.read(data(bytes(3001)), MediaBudget(limits))


TOKEN_CHARACTERS = "abcXYZ019!#$%&'*+-.^_`{|}~"
TOKENS = st.text(TOKEN_CHARACTERS, min_size=1, max_size=12)
ESCAPED = st.text(min_size=1, max_size=6).map(lambda text: "".join(f"%{byte:02X}" for byte in text.encode()))
QUOTED = st.text(st.characters(codec="utf-8", exclude_categories=["C"]) | st.sampled_from(';,"\\ ='), max_size=12).map(
    lambda text: '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
)
PARAMETERS = st.lists(st.tuples(TOKENS, TOKENS | ESCAPED | QUOTED), max_size=8)


@given(subtype=TOKENS, parameters=PARAMETERS, word=st.sampled_from(["base64", "BASE64", "Base64"]), content=st.binary())
def test_the_grammar(subtype: str, parameters: list[tuple[str, str]], word: str, content: bytes) -> None:
    head = "".join(f";{name}={value}" for name, value in parameters)
    url = f"data:image/{subtype}{head};{word},{base64.b64encode(content + b'.').decode()}"
    assert data_url.read(url, MediaBudget(Limits())) == content + b"."


@given(content=st.binary(min_size=1), escape=st.randoms(use_true_random=False), lower=st.booleans())
def test_escapes_in_base64(content: bytes, escape: object, lower: bool) -> None:
    choose = escape.random  # type: ignore[attr-defined]
    text = "".join(f"%{ord(c):02X}" if choose() < 0.5 else c for c in base64.b64encode(content).decode())
    budget = MediaBudget(Limits(max_image_mb=len(content) / 1e6))
    assert (
        data_url.read("data:image/png;base64," + (text.lower() if lower and choose() < 0 else text), budget) == content
    )
    with pytest.raises(LimitExceeded):
        data_url.read("data:image/png;base64," + text, MediaBudget(Limits(max_image_mb=(len(content) - 1) / 1e6)))


@pytest.mark.parametrize(
    "head",
    [
        "data:image/svg+xml;charset=utf-8",
        "data:image/png;name=holiday%20photo%20(1).png",
        "data:image/png;name=it's!.png",
        'data:image/png;name="a, b; c.png"',
        r'data:image/png;name="a \"b\" \\.png"',
        "data:image/png; name=a.png; charset=x",
        "data:image/png;name=été.png",
        "data:image/vnd.microsoft.icon;a=1;b=2;c=3;d=4;e=5;f=6",
        "data:image/png;name=" + "x" * 3000,
        "data:image/png;name=",
    ],
    ids=lambda head: ascii(head)[11:40],
)
def test_heads_that_clients_send(head: str) -> None:
    assert data_url.read(f"{head};base64,YWJj", MediaBudget(Limits())) == b"abc"


@pytest.mark.parametrize(
    "piece", [";a=b", ';a="', '\\"', "%41", "%4", "%", "x", ";", "=", "; ", ";a=", "A", ",", ";base64"], ids=ascii
)
@pytest.mark.parametrize("start", ["data:image/png", "data:image/png;base64,", 'data:image/png;a="'])
def test_time_grows_no_faster_than_the_url(start: str, piece: str) -> None:
    def seconds(count: int) -> float:
        url = start + piece * count
        best = float("inf")
        for _ in range(3):
            began = time.thread_time()
            with suppress(InvalidImage, LimitExceeded):
                data_url.read(url, MediaBudget(Limits()))
            best = min(best, time.thread_time() - began)
        return best

    assert seconds(200_000) < 6 * seconds(50_000) + 0.01
