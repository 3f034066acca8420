"""The pixel cap of `ratio: "auto"` over HTTP, on the demo model and on Qwen3-VL: a page gets what its pixels do not
predict, a photo what its group needs, and prompt, KV blocks, metrics and usage agree on the number.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foldserve.server.quality.auto.file import AutoCalibration, Group
from foldserve.server.quality.calibration_file import model_hash
from foldserve.server.quality.demo.checkpoint import CHECKPOINT
from tests import qwen_checkpoint
from tests.api.live import Live, chat
from tests.images import page, photo
from tests.reducers.naive import naive_pixelprune

STEPS, LEVELS, BLOCK = 16, 3, 32
OPTIONS = ("--block-size", str(BLOCK), "--num-gpu-blocks-override", "96")


@dataclass(frozen=True)
class Served:
    """A server whose calibration has a cap, and images whose pixels its tower sees as they are.

    Attributes:
        side: pixels of a cell.
        size: of its images.
    """

    live: Live
    side: int
    size: tuple[int, int]

    @property
    def tokens(self) -> int:
        return self.size[0] * self.size[1] // self.side**2

    def kept(self, step: int) -> int:
        return -(-self.tokens * step // STEPS)

    def unpredicted(self, image: Image.Image) -> int:
        rows, columns = self.size[1] // self.side, self.size[0] // self.side
        cells = np.asarray(image).reshape(rows, self.side, columns, self.side, 3).swapaxes(1, 2)
        return len(naive_pixelprune(cells.reshape(rows, columns, -1).tolist(), LEVELS, anchored=False))

    def capped(self, image: Image.Image) -> int:
        """The step that its pixels ask for."""
        return next(step for step in range(1, 17) if self.kept(step) >= self.unpredicted(image))

    def page(self, seed: int) -> Image.Image:
        """Text with a photo below."""
        width, height = self.size
        image = page(seed, width, height, noise=1)
        image.paste(photo(seed, width // 2, height // 2), (0, height // 2))
        return image

    def photo(self, seed: int) -> Image.Image:
        return photo(seed, *self.size)

    def ask(self, *images: Image.Image, turns: Any = (), question: str = "What is it?", **fields: Any) -> Any:
        """The answer as JSON; `group` and what else `ratio: "auto"` takes may stand in place of a reduction."""
        reduction = fields.pop("reduction", None) or {"ratio": "auto", **fields}
        body = chat(question, *map(part, images), reduction=reduction, temperature=0)
        body["messages"] = [*turns, *body["messages"]]
        answer = self.live.ask("POST", "/v1/chat/completions", body)
        assert answer.status == 200, answer.body
        return answer.json

    def hits(self, *images: Image.Image, **fields: Any) -> tuple[int, Any]:
        """(prompt tokens that were found in the prefix cache, the answer)"""
        asked, hit = (self.live.metrics(f"vllm:prefix_cache_{what}_total") for what in ("queries", "hits"))
        answer = self.ask(*images, **fields)
        queries = asked + answer["usage"]["prompt_tokens"]
        self.live.wait(lambda: self.live.metrics("vllm:prefix_cache_queries_total") == queries)
        return int(self.live.metrics("vllm:prefix_cache_hits_total") - hit), answer


def part(image: Image.Image) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def write_calibration(file: Path, checkpoint: Path, tokens: int) -> None:
    """As `foldserve calibrate --auto --pixel-cap` would."""

    def group(step: int, *, is_capped: bool = True) -> Group:
        return Group(samples=100, step=step, changed=(0.03,) * 16, bound=(0.04,) * 16, is_capped=is_capped)

    AutoCalibration(
        model="m",
        model_hash=model_hash(checkpoint),
        reduction={},
        target=0.05,
        answer_tokens=32,
        data="pages",
        data_hash="sha256:0",
        tokens=tokens,
        steps=tuple(range(1, 16)),
        groups={"ocr": group(14), "colour": group(2), "count": group(16, is_capped=False)},
        together=group(14),
        pixel_cap=LEVELS,
        kept_uncapped=0.9,
    ).write(file)


@pytest.fixture(scope="module", params=["demo", "qwen"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "demo":
        checkpoint, model, side, size = CHECKPOINT, None, 8, (96, 96)
    else:
        checkpoint = model = qwen_checkpoint.write(folder / "tiny-qwen3-vl", "qwen3_vl")
        side, size = 32, (384, 256)
    write_calibration(folder / "auto.json", checkpoint, size[0] * size[1] // side**2)
    live = Live(model, folder, *OPTIONS, "--auto", str(folder / "auto.json"))
    yield Served(live, side, size)
    live.end()


def test_a_page_gets_what_its_pixels_do_not_predict(served: Served) -> None:
    image = served.page(1)
    step = served.capped(image)
    assert 4 < step < 14, "else the image shows nothing"
    before = served.live.metrics("foldserve_vision_tokens_total", stage="kept")
    usage = served.ask(image, group="ocr")["usage"]
    vision = usage["vision_tokens"]
    assert (vision["kept"], vision["step"], vision["u"]) == (served.kept(step), step, served.unpredicted(image))
    assert (vision["encoded"], vision["target"], vision["group"]) == (served.tokens, 0.05, "ocr")
    assert served.live.metrics("foldserve_vision_tokens_total", stage="kept") == before + vision["kept"]
    whole = served.ask(image, reduction={"ratio": 0})["usage"]
    assert whole["prompt_tokens"] - usage["prompt_tokens"] == served.tokens - vision["kept"]


def test_a_photo_gets_what_its_group_needs(served: Served) -> None:
    image = served.photo(2)
    vision = served.ask(image, group="ocr")["usage"]["vision_tokens"]
    assert (vision["kept"], vision["step"], vision["u"]) == (served.kept(14), 14, served.tokens)


@pytest.mark.parametrize(
    ("fields", "step", "target"),
    [
        ({"group": "colour"}, 4, 0.05),  # the server's bounds
        ({"group": "ocr", "bounds": [0, 0.1]}, 15, 0.05),
        ({"group": "ocr", "bounds": [0.8, 0.9]}, 3, None),
    ],
    ids=str,
)
def test_bounds_hold(served: Served, fields: dict[str, Any], step: int, target: float | None) -> None:
    vision = served.ask(served.page(1), **fields)["usage"]["vision_tokens"]
    assert (vision["kept"], vision["step"], vision["target"]) == (served.kept(step), step, target)


@pytest.mark.parametrize("group", ["count", "unknown"])
def test_groups_without_a_cap_keep_everything(served: Served, group: str) -> None:
    vision = served.ask(served.page(1), group=group)["usage"]["vision_tokens"]
    assert vision["kept"] == served.tokens and "u" not in vision


def test_several_images_each_get_their_own(served: Served) -> None:
    images = [served.page(1), served.photo(2), served.page(3)]
    vision = served.ask(*images, group="ocr")["usage"]["vision_tokens"]
    steps = [min(14, served.capped(image)) for image in images]
    assert [image["kept"] for image in vision["images"]] == [served.kept(step) for step in steps]
    assert vision["u"] == sum(map(served.unpredicted, images))


def test_a_stream_says_the_same(served: Served) -> None:
    fields: dict[str, Any] = {"reduction": {"ratio": "auto", "group": "ocr"}, "stream_options": {"include_usage": True}}
    answer = served.live.chat("What is it?", part(served.page(1)), stream=True, **fields)
    usage = json.loads(answer.events[-2])["usage"]["vision_tokens"]
    assert usage == served.ask(served.page(1), group="ocr")["usage"]["vision_tokens"]


def test_a_retry_and_a_later_turn_find_the_image_in_the_prefix_cache(served: Served) -> None:
    image = served.page(11)
    first, answer = served.hits(image, group="ocr")
    vision, tokens = answer["usage"]["vision_tokens"], answer["usage"]["prompt_tokens"]
    assert first < BLOCK and vision["step"] == served.capped(image) < 14
    blocks = (tokens - 1) // BLOCK * BLOCK
    again, retry = served.hits(image, group="ocr")
    assert again == blocks >= BLOCK and retry["usage"]["vision_tokens"] == vision
    content = [part(image), {"type": "text", "text": "What is it?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "a page"}]
    later, answer = served.hits(turns=turns, question="And now?", group="ocr")
    assert answer["usage"]["vision_tokens"] == vision
    assert later >= vision["kept"] // BLOCK * BLOCK


def test_one_count_is_one_image_and_another_count_another(served: Served) -> None:
    """A number that comes to the same shares the cache with it and gets the same answer; without a cap nothing does."""
    image = served.page(12)
    _, answer = served.hits(image, group="ocr")
    step = answer["usage"]["vision_tokens"]["step"]
    found, same = served.hits(image, reduction={"ratio": (STEPS - step) / STEPS})
    assert found == (answer["usage"]["prompt_tokens"] - 1) // BLOCK * BLOCK
    assert same["choices"][0]["message"]["content"] == answer["choices"][0]["message"]["content"]
    assert served.hits(image, group="count")[0] < BLOCK
    assert served.hits(image, reduction={"ratio": (STEPS - step - 1) / STEPS})[0] < BLOCK


@pytest.mark.parametrize(
    "fields",
    [
        {"reduction": {"ratio": 0.5, "pixel_cap": 2}},
        {"reduction": {"ratio": "auto", "levels": 2}},
        {"mm_processor_kwargs": {"foldserve_caps": [2]}},
    ],
    ids=str,
)
def test_a_client_sends_no_cap(served: Served, fields: dict[str, Any]) -> None:
    assert served.live.chat("hello", part(served.page(1)), **fields).status == 400


def test_the_cap_is_shown(served: Served) -> None:
    shown = served.live.ask("GET", "/v1/reducers").json["auto"]
    assert (shown["pixel_cap"], shown["uncapped"]) == (LEVELS, ["count"])


def test_a_full_server_takes_off_steps_of_what_pixels_ask_for(served: Served) -> None:
    """Never below the bounds; once it is free again, the image keeps its count."""
    image, done = served.page(21), Event()
    step = served.capped(image)

    def fill(number: int) -> None:
        while not done.is_set():
            served.live.chat(f"wait {number}", max_tokens=500)

    with ThreadPoolExecutor(16) as pool:
        chats = [pool.submit(fill, number) for number in range(16)]
        try:
            served.live.wait(lambda: served.live.metrics("foldserve_pressure") >= 1)
            vision = served.ask(image, group="ocr", under_load=True)["usage"]["vision_tokens"]
            bound = served.ask(image, group="ocr", under_load=True, bounds=[0, (STEPS - step) / STEPS])
        finally:
            done.set()
        for one in chats:
            one.result()
    lowered = max(4, step - vision["pressure"])
    assert vision["pressure"] >= 1 and (vision["step"], vision["target"]) == (lowered, None)
    assert (vision["kept"], vision["u"]) == (served.kept(lowered), served.unpredicted(image))
    assert bound["usage"]["vision_tokens"]["step"] == step
    again = served.ask(image, group="ocr", under_load=True)
    assert again["usage"]["vision_tokens"] == vision
