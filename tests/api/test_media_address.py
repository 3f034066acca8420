"""Which URLs of images may be asked, in every spelling of an address that parsers have been fooled by."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foldserve.server.api.errors import RefusedUrl
from foldserve.server.api.media.address import HostPolicy, is_public

PRIVATE = [
    "0.0.0.0",
    "10.1.2.3",
    "100.64.0.1",
    "127.0.0.1",
    "127.255.255.254",
    "169.254.169.254",
    "172.16.0.1",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.0.1",
    "198.18.0.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::7f00:1",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:a9fe:a9fe",
    "64:ff9b::7f00:1",
    "64:ff9b::8.8.8.8",
    "64:ff9b:1::1",
    "100::1",
    "2001::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "3fff::1",
    "5f00::1",
    "fc00::1",
    "fd12:3456::1",
    "fe80::1",
    "fe80::1%eth0",
    "2606:4700::1%eth0",
    "fec0::1",
    "ff02::1",
]
PUBLIC = ["8.8.8.8", "1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "2a00:1450:4001::200e", "::ffff:8.8.8.8"]


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("text", ["", "localhost", "127.1", "0177.0.0.1", "2130706433", "[::1]", "8.8.8.8.8"])
def test_what_is_no_address_is_not_public(text: str) -> None:
    assert not is_public(text)


@pytest.mark.parametrize("address", PRIVATE)
def test_urls_of_private_addresses(address: str) -> None:
    host = f"[{address}]" if ":" in address else address
    for url in (f"http://{host}/x.png", f"https://{host}:8443/x.png", f"HTTP://{host}"):
        with pytest.raises(RefusedUrl):
            HostPolicy().check(url)


SPELLINGS = [
    "http://127.0.0.1./x",
    "http://127.1/x",
    "http://127.0.1/x",
    "http://0/x",
    "http://2130706433/x",
    "http://017700000001/x",
    "http://0x7f000001/x",
    "http://0x7f.0.0.1/x",
    "http://0x7f.1/x",
    "http://0177.0.0.01/x",
    "http://127.0.0.0x1/x",
    "http://169.254.0xa9fe/x",
    "http://4294967297/x",
    "http://1.2.3.4.5/x",
    "http://256.256.256.256/x",
    "http://0x/x",
    "http://①②⑦.⓪.⓪.①/x",
    "http://\uff11\uff12\uff17.0.0.1/x",
    "http://127。0。0。1/x",
    "http://127\uff0e0\uff0e0\uff0e1/x",
    "http://[::ffff:7f00:1]/x",
    "http://[0:0:0:0:0:ffff:127.0.0.1]/x",
    "http://[fe80::1%25eth0]/x",
    "http://[fe80::1%eth0]/x",
    "http://[::1/x",
    "http://[]@/x",
    "http://%31%32%37.0.0.1/x",
    "http://127.0.0.1%00.example.com/x",
    "http://user@example.com/x",
    "http://user:pass@example.com/x",
    "http://:@example.com/x",
    "http://example.com@127.0.0.1/x",
    "http://a@b@example.com/x",
    "http://example.com\\@127.0.0.1/x",
    "http:\\\\127.0.0.1\\x",
    "http://example.com/\\x",
    "http://exa mple.com/x",
    " http://example.com/x",
    "http://example.com/x\n",
    "http://exam\tple.com/x",
    "http://example.com\x00/x",
    "http://a..b/x",
    "http://-/x",
    "http://example.com:99999/x",
    "http://example.com:80:80/x",
    "http://" + "a" * 64 + ".com/x",
    "http://" + "a." * 130 + "com/x",
    "http://example.com/" + "x" * 9000,
    "http:///x",
    "http:example.com/x",
    "http:/example.com/x",
    "//example.com/x",
    "example.com/x",
    "",
    "/etc/passwd",
    "file:///etc/passwd",
    "file://localhost/etc/passwd",
    "ftp://example.com/x",
    "gopher://example.com/x",
    "dict://example.com:11211/",
    "unix:///var/run/docker.sock",
    "javascript:alert(1)",
    "blob:http://example.com/x",
    "s3://bucket/x",
    "data:image/png;base64,AA==",
]


@pytest.mark.parametrize("url", SPELLINGS, ids=lambda url: ascii(url)[:60])
def test_refused_urls(url: str) -> None:
    with pytest.raises(RefusedUrl) as refusal:
        HostPolicy().check(url)
    assert "127.0.0.1" not in str(refusal.value)


PNG = "iVBORw0KGgoAAAANSUhEUgAAAEgAAAAwCAIAAAA=" * 300


@pytest.mark.parametrize(
    "text",
    [
        "iVBORw0KGgoAAAANSUhEUgAA",
        PNG,
        PNG[:100] + "\n" + PNG,
        "/9j/4AAQSkZJRgABAQ",
        "R0lGODdhAQABAPAAAP",
        "UklGR_-_",
        "base64," + PNG,
        "image/png;base64," + PNG,
        " " + PNG,
        "",
    ],
    ids=lambda text: ascii(text)[:20],
)
def test_raw_base64_is_told_what_is_missing(text: str) -> None:
    with pytest.raises(RefusedUrl, match="before base64, with data:image/TYPE;base64,"):
        HostPolicy().check(text)


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://example.com/a.png", "example.com"),
        ("http://EXAMPLE.com:8080/a%20b.png?x=%2F&y=1", "EXAMPLE.com"),
        ("https://example.com./a", "example.com."),
        ("https://bücher.example/ä.png", "xn--bcher-kva.example"),
        ("https://xn--bcher-kva.example/", "xn--bcher-kva.example"),
        ("https://my_bucket.s3.amazonaws.com/a", "my_bucket.s3.amazonaws.com"),
        ("https://1e100.net/a", "1e100.net"),
        ("https://8.8.8.8/a", "8.8.8.8"),
        ("https://[2606:4700:4700::1111]/a", "2606:4700:4700::1111"),
    ],
)
def test_accepted_urls_stay_as_they_are(url: str, host: str) -> None:
    checked = HostPolicy().check(url)
    assert checked.raw_host == host
    if url.isascii():
        assert str(checked) == url


def test_domains_of_the_operator() -> None:
    policy = HostPolicy(domains={"images.example.com"})
    assert policy.check("https://Images.Example.com./a")
    for url in ("https://example.com/a", "https://evil.images.example.com/a", "https://images.example.com.evil.org/a"):
        with pytest.raises(RefusedUrl, match="media domains"):
            policy.check(url)


def test_private_hosts_of_the_operator() -> None:
    policy = HostPolicy(private_hosts={"127.0.0.2", "minio"})
    assert policy.check("http://127.0.0.2:9000/a")
    assert policy.permits("MinIO.", "10.0.0.7")
    assert not policy.permits("minio.evil.org", "10.0.0.7")
    for url in ("http://127.0.0.1/a", "http://127.0.0.3/a", "http://[::ffff:127.0.0.2]/a", "http://2130706434/a"):
        with pytest.raises(RefusedUrl):
            policy.check(url)


HOST_CHARACTERS = "0123456789abcdefxABCDEFX.:%[]@\\/-_ ①⓪。\uff11"


@given(st.text(HOST_CHARACTERS, min_size=1, max_size=24))
def test_no_spelling_reaches_a_private_address(host: str) -> None:
    """What the check lets through is a name, or an address that the system too reads as a public one."""
    try:
        url = HostPolicy().check(f"http://{host}/x")
    except RefusedUrl:
        return
    try:
        found = socket.getaddrinfo(str(url.raw_host), 80, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (socket.gaierror, UnicodeError):
        return  # a name: the resolver's answer is checked
    assert all(is_public(str(address[0])) for *_, address in found)
