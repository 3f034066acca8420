"""A server for each model and one browser for the folder. What a page complains of, or asks of another host, fails its
test."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from tests import onevision_checkpoint
from tests.api.live import Live

SHOTS = "FOLDSERVE_SHOTS"
"""Environment variable: a folder for pictures of the page."""
_CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
PATIENCE_MS = 180_000

Open = Callable[..., Page]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    server = Live(None, tmp_path_factory.mktemp("demo"), "--withdraw-layer", "4")
    yield server
    server.end()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    found = next((path for name in _CHROMIUMS if (path := shutil.which(name))), None)
    if found is None:
        pytest.fail(f"none of {', '.join(_CHROMIUMS)} is installed (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def onevision(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Takes images in tiles, and videos, of which it takes 8 frames; its tower has the layers that iLLaVA merges in."""
    folder = tmp_path_factory.mktemp("onevision")
    checkpoint = onevision_checkpoint.write(folder / "model", layers=9)
    server = Live(checkpoint, folder, "--max-model-len", "2048", "--withdraw-layer", "2", "--video-frames", "8")
    yield server
    server.end()


@pytest.fixture
def open_page(server: Live, browser: Browser) -> Iterator[Open]:
    """Opens the playground, and waits until both settings have their map."""
    with _opening(server, browser) as opened:
        yield opened


@pytest.fixture
def open_onevision(onevision: Live, browser: Browser) -> Iterator[Open]:
    """The same, of a server with tiles and videos."""
    with _opening(onevision, browser) as opened:
        yield opened


@contextmanager
def _opening(server: Live, browser: Browser) -> Iterator[Open]:
    faults: list[str] = []
    contexts: list[Any] = []
    host = f"http://127.0.0.1:{server.port}/"

    def note(url: str) -> None:
        if not url.startswith((host, "data:", "blob:")):
            faults.append(f"foreign request: {url}")

    def opened(width: int = 1400, height: int = 1000, expected: str = "", **options: Any) -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)

        def complain(message: Any) -> None:
            if message.type in ("error", "warning") and not (expected and expected in message.text):
                faults.append(message.text)

        page.on("console", complain)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: note(request.url))
        page.goto(f"{host}playground")
        page.locator("#setting-a[data-kept]").wait_for(state="attached")
        page.locator("#setting-b[data-kept]").wait_for(state="attached")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert faults == []


def picture(page: Page, name: str, of: str = "body") -> None:
    """Where pictures are wanted, of the whole page or of one element."""
    if folder := os.environ.get(SHOTS):
        file = Path(folder) / f"{name}.png"
        page.locator(of).screenshot(path=file)
        Image.open(file).save(file.with_suffix(".webp"), quality=70, method=6)
        file.unlink()
