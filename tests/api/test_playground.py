"""The playground's files as the server sends them; `make test-pages` uses the page."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from foldserve.server.access import Access
from foldserve.server.api.auth.route import GuardedRoute, OpenRoute
from foldserve.server.api.playground.routes import playground

PAGE = Path(__file__).resolve().parents[2] / "server/api/playground/page"
FILES = sorted(file.name for file in PAGE.iterdir())
TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".png": "image/png",
    ".svg": "image/svg+xml",
}


@pytest.mark.parametrize("name", FILES)
def test_each_file_comes_as_what_it_is_under_a_strict_policy(server_url: str, name: str) -> None:
    answer = httpx.get(f"{server_url}/playground/{name}")
    assert (answer.status_code, answer.content) == (200, (PAGE / name).read_bytes())
    assert answer.headers["content-type"].split(";")[0] == TYPES[Path(name).suffix]
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_page_and_all_that_it_names(server_url: str) -> None:
    page = httpx.get(f"{server_url}/playground").text
    assert page == (PAGE / "index.html").read_text()
    named = re.findall(r'(?:href|src)="([^"]+)"', page)
    assert len(named) == 3
    for path in named:
        assert httpx.get(f"{server_url}/{path}").status_code == 200, path


@pytest.mark.parametrize("name", ["nothing.js", "..%2froutes.py", "%2e%2e/routes.py", "routes.py", "__init__.py"])
def test_nothing_else_is_served(server_url: str, name: str) -> None:
    answer = httpx.get(f"{server_url}/playground/{name}")
    assert answer.status_code == 404
    assert "import" not in answer.text


def test_nothing_is_inline_and_no_other_host_is_named() -> None:
    """The policy forbids both: such a line would do nothing."""
    for name in FILES:
        if name.endswith(".png"):
            continue
        text = (PAGE / name).read_text()
        assert not re.search(r"\son\w+=\"|<style|style=\"|javascript:|<script>", text), name
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), name
        assert not re.search(r"\beval\(|new Function|innerHTML|insertAdjacentHTML|document\.write", text), name


def test_the_page_needs_no_key_and_its_calls_do() -> None:
    assert all(type(route) is OpenRoute for route in playground.routes)
    assert not issubclass(OpenRoute, GuardedRoute)


@pytest.mark.parametrize("path", ["/playground", "/playground/app.js"])
def test_a_server_without_it(path: str) -> None:
    app = FastAPI()
    app.include_router(playground)
    app.state.foldserve_lifecycle = SimpleNamespace(explain=lambda error: error)
    app.state.foldserve_playground = Access(playground=False).playground
    answer = TestClient(app).get(path)
    assert answer.status_code == 404
    assert "--no-playground" in answer.json()["error"]["message"]
