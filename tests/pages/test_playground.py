"""The playground in a real browser, on a real server with the demo model."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Page, expect

from tests.api.live import Live, chat
from tests.images import photo
from tests.pages.conftest import Open, picture

SCENE = Path(__file__).resolve().parents[2] / "server/api/playground/page/scene.png"
EACH = ("a", "b")


def saved(image: Image.Image, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def upload(page: Page, content: bytes, name: str = "image.png", kind: str = "image/png") -> None:
    page.locator("#file").set_input_files({"name": name, "mimeType": kind, "buffer": content})


def part(content: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(content).decode()}"}}


def kept(page: Page, setting: str) -> int:
    return int(page.locator(f"#setting-{setting}").get_attribute("data-kept") or -1)


def choose(page: Page, setting: str, label: str, value: str) -> None:
    """A control of a setting; waits until the server has said what that makes."""
    with page.expect_response("**/v1/reductions/map") as answered:
        control = page.locator(f"#setting-{setting}").get_by_label(label, exact=False).first
        if control.get_attribute("type") == "range":
            control.fill(value)
        else:
            control.select_option(value)
    answered.value.finished()


def ask(page: Page, question: str) -> None:
    page.fill("#question", question)
    page.click("#send")
    page.locator("#clear").wait_for()


def pixel(page: Page, x: float, y: float) -> list[int]:
    """Of the canvas, at shares of its size."""
    script = """([x, y]) => {
        const canvas = document.getElementById("canvas");
        const at = [Math.round(x * canvas.width), Math.round(y * canvas.height)];
        return [...canvas.getContext("2d").getImageData(...at, 1, 1).data].slice(0, 3);
    }"""
    found: list[int] = page.evaluate(script, [x, y])
    return found


def test_both_answers_stream_and_are_measured(open_page: Open) -> None:
    page = open_page()
    picture(page, "playground-start")
    ask(page, "what is at the top right?")
    for setting, tokens in zip(EACH, (72, 144), strict=True):
        answer = page.locator(f".answer.{setting}")
        expect(answer.locator(".text")).to_have_text(" a cyan star")
        expect(answer.locator(".stats")).to_contain_text(f"{tokens} of 144 vision tokens")
    bars = page.locator(".bar span").all_inner_texts()
    assert bars[4:6] == ["72", "144"] and bars[7] == "0 B" and bars[6] not in ("-", "0 B")
    assert all(text.endswith(" ms") for text in bars[:2])
    picture(page, "playground")


def test_later_turns_know_the_earlier_ones(open_page: Open) -> None:
    page = open_page()
    bodies: list[dict[str, Any]] = []
    page.on("request", lambda it: bodies.append(it.post_data_json) if it.url.endswith("/completions") else None)
    ask(page, "what number is shown?")
    ask(page, "what is at the top right?")
    assert page.locator("#turns > li").count() == 2
    roles = [[message["role"] for message in body["messages"]] for body in bodies]
    assert roles == [["user"]] * 2 + [["user", "assistant", "user"]] * 2
    assert bodies[2]["messages"][1]["content"].strip() == "562"
    page.click("#clear")
    assert page.locator("#turns > li").count() == 0


def test_controls_say_what_usage_will(open_page: Open, server: Live) -> None:
    page = open_page()
    content = saved(photo(3))
    with page.expect_response("**/v1/reductions/map"):
        upload(page, content)
    for method, ratio in (("folder", "0.75"), ("random", "0.31"), ("tome", "0.5")):
        choose(page, "a", "method", method)
        choose(page, "a", "share of tokens removed", ratio)
        usage = server.chat("what?", part(content), reduction={"method": method, "ratio": float(ratio)}).json["usage"]
        expect(page.locator("#setting-a")).to_have_attribute("data-kept", str(usage["vision_tokens"]["kept"]))


def test_withdrawal_shows_where_tokens_leave(open_page: Open) -> None:
    page = open_page()
    strip = page.locator("#setting-b .strip i")
    layers = strip.count()
    choose(page, "b", "in decoder", "withdraw")
    expect(page.locator("#setting-b .strip i.full")).to_have_count(4)
    assert strip.count() == layers > 4
    expect(page.locator("#setting-b .strip-text")).to_contain_text("layers 0 to 3, then none")
    ask(page, "what number is shown?")
    shown = page.locator(".bar span").all_inner_texts()[7]
    assert shown not in ("0 B", "-")


def test_the_map_has_borders_between_groups_alone(open_page: Open, server: Live) -> None:
    page = open_page(expected="Canvas2D")  # which warns of reading pixels
    body = chat("what?", part(SCENE.read_bytes()), reduction={"method": "folder", "ratio": 0.5})
    (item,) = server.ask("POST", "/v1/reductions/map", body).json["items"]
    (grid,) = item["grids"]
    columns, rows, group = grid["columns"], grid["rows"], grid["group"]
    borders, inside = 0, 0
    for row in range(rows):
        for column in range(columns - 1):
            token = row * columns + column
            found = pixel(page, (column + 1) / columns, (row + 0.5) / rows)
            if group[token] == group[token + 1]:
                assert found != [0, 0, 0]
                inside += 1
            else:
                assert found == [0, 0, 0], (row, column)
                borders += 1
    assert borders > 20 and inside > 10
    picture(page, "token-map", "#canvas")
    page.locator("button", has_text="map of B").click()
    page.wait_for_timeout(200)
    assert pixel(page, 1 / columns, 0.5 / rows) == [0, 0, 0]  # every token is its own there
    page.locator("button", has_text="image").first.click()
    page.wait_for_timeout(200)
    assert pixel(page, 1 / columns, 0.5 / rows) != [0, 0, 0]


def test_pointer_and_keys_say_what_a_token_became(open_page: Open) -> None:
    page = open_page()
    box = page.locator("#canvas").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 5, box["y"] + 5)
    expect(page.locator("#tip")).to_contain_text("row 1, column 1: one of")
    page.mouse.move(0, 0)
    expect(page.locator("#tip")).to_have_text("")
    page.locator("#canvas").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#tip")).to_contain_text("row 2, column 1")


@pytest.mark.parametrize(
    ("content", "name", "kind", "message"),
    [
        (b"this is no image", "text.png", "image/png", "this browser can't read text.png as an image"),
        (saved(photo(1), "BMP"), "image.bmp", "image/bmp", "the file is no JPEG, PNG, WebP or GIF image"),
    ],
    ids=["no image", "of a kind that the server does not take"],
)
def test_a_bad_image_is_said_to_be_bad(open_page: Open, content: bytes, name: str, kind: str, message: str) -> None:
    page = open_page(expected="400")
    upload(page, content, name, kind)
    expect(page.locator("#media-error")).to_contain_text(message)


def test_what_the_server_refuses_is_shown_beside_the_control(open_page: Open) -> None:
    page = open_page(expected="400")
    choose(page, "a", "method", "pool")
    choose(page, "a", "share of tokens removed", "0.6")
    expect(page.locator("#setting-a .error")).to_contain_text("no whole number of windows")
    choose(page, "a", "share of tokens removed", "0.75")
    expect(page.locator("#setting-a .error")).to_be_hidden()
    assert kept(page, "a") == 36


def test_a_server_with_keys_is_given_one(open_page: Open, server: Live) -> None:
    page = open_page(expected="401")
    keys: list[str | None] = []

    def guard(route: Any) -> None:
        keys.append(route.request.headers.get("authorization"))
        refused = {"error": {"message": "an API key is needed", "code": "invalid_api_key"}}
        if keys[-1] != "Bearer fsk-right":
            route.fulfill(status=401, json=refused)
        else:
            route.continue_()

    page.route("**/v1/**", guard)
    page.reload()
    page.fill("#key", "fsk-right")
    page.locator("#key-dialog button").click()
    page.locator("#setting-a[data-kept]").wait_for(state="attached")
    assert keys[0] is None and set(keys[1:]) == {"Bearer fsk-right"}
    expect(page.locator("#snippet")).to_contain_text("$KEY")
    assert "fsk-right" not in page.locator("#snippet").inner_text()


def test_copied_programs_run(open_page: Open, tmp_path: Path) -> None:
    page = open_page()
    (tmp_path / "image.png").write_bytes(SCENE.read_bytes())
    curl = page.locator("#snippet").inner_text()
    ran = subprocess.run(["bash", "-c", curl], cwd=tmp_path, capture_output=True, text=True, check=True)
    answer = json.loads(ran.stdout)
    assert answer["choices"][0]["message"]["content"].strip() == "562"
    assert answer["usage"]["vision_tokens"]["kept"] == 72
    page.select_option("#code-language", "Python")
    script = page.locator("#snippet").inner_text()
    ran = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "562" in ran.stdout and "'kept': 72" in ran.stdout


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_fault(open_page: Open, scheme: Any) -> None:
    page = open_page(color_scheme=scheme, bypass_csp=True)  # it is put into the page as a script
    ask(page, "what number is shown?")
    found = Axe().run(page)
    assert [(one["id"], one["nodes"][0]["target"]) for one in found.response["violations"]] == []
    picture(page, f"playground-{scheme}")


def test_a_phone_needs_no_scrolling_sideways(open_page: Open) -> None:
    page = open_page(390, 844)
    ask(page, "what number is shown?")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    picture(page, "playground-phone")
