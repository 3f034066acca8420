"""The page and its files. They hold no secret and need no key: the page asks for one if its calls need it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from fastapi import APIRouter, Request, Response

from foldserve.server.api.auth.route import OpenRoute
from foldserve.server.api.errors import UnsupportedRoute

_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".png": "image/png",
    ".svg": "image/svg+xml",
}

HEADERS: Mapping[str, str] = MappingProxyType(
    {
        "Cache-Control": "no-cache",
        "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data: blob:; media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
)
"""The page loads nothing from other hosts, runs no inline script or style, and can't be framed by another page."""

playground = APIRouter(route_class=OpenRoute, include_in_schema=False)


def _files() -> dict[str, tuple[bytes, str]]:
    """Content and type of each file, by name: requests never read from the disk."""
    folder = Path(__file__).parent / "page"
    return {file.name: (file.read_bytes(), _TYPES[file.suffix]) for file in folder.iterdir()}


_FILES = _files()


@playground.get("/playground")
async def page(raw_request: Request) -> Response:
    return _answer(raw_request, "index.html")


@playground.get("/playground/{name}")
async def file(name: str, raw_request: Request) -> Response:
    return _answer(raw_request, name)


def _answer(request: Request, name: str) -> Response:
    if not request.app.state.foldserve_playground:
        raise UnsupportedRoute("this server has no playground: it was started with --no-playground")
    if name not in _FILES:
        raise UnsupportedRoute(f"the playground has no such file: it is at {request.scope['root_path']}/playground")
    content, kind = _FILES[name]
    return Response(content, media_type=kind, headers=dict(HEADERS))
