"""A registry on this machine: as much of the OCI distribution API as `make pin-images` uses."""

from __future__ import annotations

import hashlib
import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import trustme

INDEX = "application/vnd.oci.image.index.v1+json"


def index(of: str) -> bytes:
    """The manifest of a tag: an index over two platforms."""
    manifests = [
        {
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": digest(f"{of} {architecture}".encode()),
            "size": 1234,
            "platform": {"architecture": architecture, "os": "linux"},
        }
        for architecture in ("amd64", "arm64")
    ]
    return json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests}).encode()


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@dataclass
class Registry:
    """What the server has, and what it was asked.

    Attributes:
        manifests: by `repository:tag`.
        asked: every request's method and path.
    """

    host: str = ""
    manifests: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    registry: Registry

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.registry.asked.append(f"GET {url.path}")
        (scope,) = parse_qs(url.query)["scope"]
        self._answer(200, json.dumps({"token": f"for {scope}"}).encode())

    def do_HEAD(self) -> None:
        self.registry.asked.append(f"HEAD {self.path}")
        repository, _, tag = self.path.removeprefix("/v2/").partition("/manifests/")
        if repository.startswith("private/"):
            self._answer(401, b"", {"WWW-Authenticate": 'Basic realm="private"'})
            return
        scope = f"repository:{repository}:pull"
        if self.headers["Authorization"] != f"Bearer for {scope}":
            challenge = f'Bearer realm="https://{self.registry.host}/token",service="here",scope="{scope}"'
            self._answer(401, b"", {"WWW-Authenticate": challenge})
            return
        manifest = self.registry.manifests.get(f"{repository}:{tag}")
        if manifest is None or INDEX not in self.headers["Accept"]:
            self._answer(404, b"")
        else:
            self._answer(200, manifest, {"Content-Type": INDEX, "Docker-Content-Digest": digest(manifest)})

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: pytest would show it."""

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def running(authority: trustme.CA) -> Iterator[Registry]:
    """A registry with HTTPS, until the block ends."""
    registry = Registry()
    handler = type("Handler", (_Handler,), {"registry": registry})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("localhost").configure_cert(context)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        registry.host = f"localhost:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield registry
        finally:
            server.shutdown()
            thread.join()
