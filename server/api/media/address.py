"""Which hosts may be asked for an image. The URL is parsed once, here, and the parsed value is what gets requested."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network
from urllib.parse import quote

from yarl import URL

from foldserve.server.api.errors import RefusedUrl

_LONGEST_URL = 8192
_NEVER_IN_A_URL = re.compile(r"[\x00-\x20\x7f\\]")
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*+):", re.IGNORECASE)
_AUTHORITY = re.compile(r"((?:[a-z][a-z0-9+.-]*+:)?(?://[^/?#]*+)?)(.*)", re.IGNORECASE | re.DOTALL)
_UNESCAPED = re.compile(r"[\x20\x80-\U0010ffff]+")
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*", re.IGNORECASE)
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.IGNORECASE)

# IPv6 has one block of global unicast addresses (RFC 4291, IANA's registry). These networks inside it are not hosts of
# the internet, or hide an IPv4 address: protocol assignments with Teredo, documentation, 6to4. NAT64 lies outside.
_GLOBAL_V6 = IPv6Network("2000::/3")
_NOT_GLOBAL_V6 = tuple(map(IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")))
_RELAYS_V4 = ipaddress.IPv4Network("192.88.99.0/24")  # 6to4, RFC 7526


def is_public(text: str) -> bool:
    """Whether an address, as the resolver or a URL spells it, belongs to a host of the public internet."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    if isinstance(address, IPv4Address):
        return address.is_global and not address.is_multicast and address not in _RELAYS_V4
    if address.scope_id is not None or address not in _GLOBAL_V6:
        return False
    return not any(address in network for network in _NOT_GLOBAL_V6)


@dataclass(frozen=True, slots=True)
class HostPolicy:
    """The operator's choice of hosts.

    `domains` are the only hosts that may be asked (empty: all). `private_hosts` may have addresses that are not public.
    """

    domains: Collection[str] = ()
    private_hosts: Collection[str] = ()

    def check(self, text: str) -> URL:
        """Parses the URL of an image; raises RefusedUrl unless it is a plain http(s) URL of a permitted host."""
        url = _parse(text)
        host = _host(url)
        if self.domains and host not in self.domains:
            raise RefusedUrl("images may not be fetched from this host: it is not one of the server's media domains")
        if _is_literal(host) and not self.permits(host, host):
            raise RefusedUrl("images may not be fetched from this address: it is not on the public internet")
        return url

    def permits(self, host: str, address: str) -> bool:
        """Whether a connection to `address`, to which `host` resolves, may be opened."""
        return is_public(address) or host.removesuffix(".").lower() in self.private_hosts


def join(base: URL, location: str) -> str:
    """The URL that a redirect leads to, not yet checked; raises RefusedUrl if it is not a URL.

    `location` is the header, relative or absolute; servers leave spaces and other scripts in paths unescaped.
    """
    authority, path = _AUTHORITY.fullmatch(location).groups()  # type: ignore[union-attr]  # anything matches
    escaped = _UNESCAPED.sub(
        lambda found: quote(found[0], errors="surrogateescape"), path
    )  # Latin-1 too stays as it is
    return str(base.join(_read(authority + escaped)))


def _parse(text: str) -> URL:
    scheme = _SCHEME.match(text)
    if scheme is None:
        raise RefusedUrl(
            "an image's URL must begin with https:// or http://, or, before base64, with data:image/TYPE;base64,"
        )
    if scheme[1].lower() not in ("http", "https"):
        raise RefusedUrl("an image's URL must begin with https://, http:// or data:image/")
    url = _read(text)
    if not url.raw_host:
        raise RefusedUrl("the URL names no host")
    if url.raw_user is not None or url.raw_password is not None:
        raise RefusedUrl("the URL holds a user name or password: leave them out")
    return url


def _read(text: str) -> URL:
    if len(text) > _LONGEST_URL:
        raise RefusedUrl(f"the URL has {len(text)} characters: at most {_LONGEST_URL} are allowed")
    if _NEVER_IN_A_URL.search(text):
        raise RefusedUrl("the URL holds a space, a backslash or a control character: percent-encode them")
    try:
        url = URL(text, encoded=text.isascii())  # unchanged, so that signatures stay valid; other scripts are encoded
        _ = url.raw_host, url.port  # parsed when first asked for
    except (ValueError, IndexError) as error:  # IndexError: yarl on "http://[]@/"
        raise RefusedUrl("this is not a valid URL") from error
    return url


def _host(url: URL) -> str:
    """The host in lower case and without a trailing dot, if it is a name or an address in its usual spelling."""
    host = str(url.raw_host).lower().removesuffix(".")
    if _is_literal(host):
        return host
    # Many parsers read what ends in a number as an IPv4 address: 127.1, 0x7f.1, 2130706433. One spelling is enough.
    if not _NAME.fullmatch(host) or _NUMBER.fullmatch(host.rpartition(".")[2]):
        raise RefusedUrl("the URL's host is neither a name nor an address in its usual spelling")
    return host


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
