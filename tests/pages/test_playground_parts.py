"""The playground on videos and on images in tiles: their parts, the methods that work on them, and bad files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright._impl._driver import compute_driver_executable
from playwright.sync_api import Page, expect

from tests import videos
from tests.api.live import Live, chat
from tests.images import photo
from tests.pages.conftest import Open, picture
from tests.pages.test_playground import EACH, SCENE, ask, choose, kept, part, pixel, saved, upload

FRAMES = 60
TAKEN = [0, 8, 16, 25, 33, 42, 50, 59]
"""Of a video's frames, evenly spaced; 10 are shown a second."""
GRID = 5 * 5
"""Tokens of a frame; a newline follows the last."""
CLIP = videos.video(FRAMES)
_FAST = videos.video(FRAMES, container_options={"movflags": "faststart"})
CUT = _FAST[: len(_FAST) * 2 // 3]


def use(page: Page, content: bytes, name: str, kind: str) -> None:
    """Waits until both settings have their map of it."""
    page.evaluate("document.querySelectorAll('.setting').forEach((one) => delete one.dataset.kept)")
    upload(page, content, name, kind)
    for setting in EACH:
        page.locator(f"#setting-{setting}[data-kept]").wait_for(state="attached")


def use_video(page: Page, content: bytes, name: str = "clip.mp4") -> None:
    use(page, content, name, "video/mp4")


def methods(page: Page, setting: str = "a") -> list[str]:
    return page.locator(f"#setting-{setting} select").first.locator("option").all_inner_texts()


def captions(page: Page) -> list[str]:
    """How many tokens stay of each part."""
    return page.locator("#parts b").all_inner_texts()


def test_the_frames_shown_are_those_that_the_server_took(open_onevision: Open) -> None:
    page = open_onevision(expected="Canvas2D")
    use_video(page, CLIP)
    page.locator("button", has_text="video").first.click()
    expect(page.locator("#parts button")).to_have_count(len(TAKEN))
    found = []
    for number, button in enumerate(page.locator("#parts button").all()):
        button.click()
        expect(button).to_have_attribute("aria-pressed", "true")
        expect(button).to_have_text(f"frame {number + 1} · {TAKEN[number] / 10:.1f}\N{NO-BREAK SPACE}s")
        found.append(round(sum(pixel(page, 0.75, 0.75)) / 3 / videos.STEP))
    assert found == TAKEN


def test_both_answers_about_a_video_and_what_was_kept(open_onevision: Open, onevision: Live) -> None:
    page = open_onevision()
    bodies: list[dict[str, Any]] = []
    page.on("request", lambda it: bodies.append(it.post_data_json) if it.url.endswith("/completions") else None)
    use_video(page, CLIP)
    choose(page, "a", "method", "evs")
    clip = {"type": "video_url", "video_url": {"url": videos.data_uri(CLIP)}}
    usage = onevision.chat("what?", clip, reduction={"method": "evs", "ratio": 0.5}).json["usage"]["vision_tokens"]
    assert kept(page, "a") == usage["kept"] < usage["encoded"] == kept(page, "b") == len(TAKEN) * GRID + 1
    counts = [int(text.removesuffix(f" of {GRID}")) for text in captions(page)]
    assert counts[0] == GRID and sum(counts) + 1 == usage["kept"] and len(set(counts)) > 1
    ask(page, "which colour?")
    for setting in EACH:
        expect(page.locator(f".answer.{setting} .text")).not_to_be_empty()
    ask(page, "and where?")
    for setting in EACH:
        answers = page.locator(f".answer.{setting}")
        expect(answers).to_have_count(2)
        for answer in answers.all():
            expect(answer.locator(".stats")).to_contain_text(f"{kept(page, setting)} of {usage['encoded']} vision")
    assert all(body["stream"] and body["messages"][0]["content"][0] == clip for body in bodies)
    assert [len(body["messages"]) for body in bodies] == [1, 1, 3, 3]
    picture(page, "playground-video")


def test_methods_are_offered_for_what_they_work_on(open_onevision: Open) -> None:
    page = open_onevision()
    of_videos, of_images = {"vidcom2", "evs"}, {"base_only"}
    assert of_images <= set(methods(page)) and not of_videos & set(methods(page))
    use_video(page, CLIP)
    assert of_videos <= set(methods(page)) and not of_images & set(methods(page))
    choose(page, "b", "method", "vidcom2")
    use(page, SCENE.read_bytes(), "scene.png", "image/png")
    assert not of_videos & set(methods(page, "b"))
    assert page.locator("#setting-b select").first.input_value() == "none"
    assert page.locator("#setting-a select").first.input_value() == "folder"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no video", "the file is no MP4 or WebM video"), (CUT, "the video file is damaged or cut short")],
    ids=["no video", "cut short"],
)
def test_a_bad_video_is_said_to_be_bad(open_onevision: Open, content: bytes, message: str) -> None:
    page = open_onevision(expected="400")
    use_video(page, CLIP)
    expect(page.locator("#parts")).to_be_visible()
    upload(page, content, "bad.mp4", "video/mp4")
    expect(page.locator("#media-error")).to_have_text(message)
    expect(page.locator("#parts")).to_be_hidden()
    use_video(page, CLIP)
    expect(page.locator("#media-error")).to_be_hidden()
    expect(page.locator("#parts button")).to_have_count(len(TAKEN))


def test_a_video_that_only_the_server_can_read_has_a_map_without_pictures(open_onevision: Open) -> None:
    page = open_onevision()
    use_video(page, videos.video(FRAMES, codec="mpeg4", options={}), "old.mp4")
    expect(page.locator("#media-error")).to_contain_text("this browser can't play old.mp4")
    expect(page.locator("#parts button")).to_have_count(len(TAKEN))


def test_copied_programs_run_with_a_video(open_onevision: Open, tmp_path: Path) -> None:
    page = open_onevision()
    use_video(page, CLIP)
    page.fill("#max-tokens", "4")
    (tmp_path / "video.mp4").write_bytes(CLIP)
    (tmp_path / "program.mjs").touch()
    node, _ = compute_driver_executable()
    programs = {"curl": ["bash"], "Python": [sys.executable], "JavaScript": [node]}
    outputs = {}
    for language, command in programs.items():
        page.select_option("#code-language", language)
        program = tmp_path / f"program{'.mjs' if language == 'JavaScript' else ''}"
        program.write_text(page.locator("#snippet").inner_text())
        ran = subprocess.run([*command, program], cwd=tmp_path, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        outputs[language] = ran.stdout
    usage = json.loads(outputs["curl"])["usage"]["vision_tokens"]
    assert usage["videos"][0]["kept"] == kept(page, "a")
    assert f"'kept': {usage['kept']}," in outputs["Python"] and f"kept: {usage['kept']}," in outputs["JavaScript"]


def test_the_parts_of_an_image_in_tiles(open_onevision: Open, onevision: Live) -> None:
    page = open_onevision(bypass_csp=True)  # axe-core is put into the page as a script
    content = saved(photo(7, 500, 370))
    use(page, content, "image.png", "image/png")
    expect(page.locator("#parts span")).to_have_text(["base", "mosaic"])
    choose(page, "a", "share of tokens removed", "0.56")  # 36 of 81 tokens of a tile stay, which are a square
    choose(page, "a", "method", "illava")
    expect(page.locator("#parts span")).to_have_text(["base", "tiles"])
    body = chat("what?", part(content), reduction={"method": "illava", "ratio": 0.56})
    base, *tiles = onevision.ask("POST", "/v1/reductions/map", body).json["items"][0]["grids"]
    counts = [
        f"{sum(len(grid['sizes']) for grid in grids)} of {sum(len(grid['group']) for grid in grids)}"
        for grids in ([base], tiles)
    ]
    expect(page.locator("#parts b")).to_have_text(counts)
    page.locator("#parts button").nth(1).click()
    page.locator("#canvas").focus()
    for _ in range(1 + tiles[0]["columns"]):  # the first key goes to the first token
        page.keyboard.press("ArrowRight")
    expect(page.locator("#tip")).to_contain_text("tile 2, row 1, column 1")
    found = Axe().run(page)
    assert [(one["id"], one["nodes"][0]["target"]) for one in found.response["violations"]] == []
    picture(page, "playground-tiles")
