"""LLaVA-OneVision over HTTP: images in tiles, `detail`, base tiles of several images, squares, withdrawal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from tests import onevision_checkpoint, videos
from tests.api.live import Live
from tests.api.test_qwen import ask, clip, image

SMALL, WIDE = (100, 120), (500, 370)
ENCODED = {SMALL: 81 + 9 * 7 + 9, WIDE: 81 + 23 * 31 + 23}
"""A base tile, rows and columns of a mosaic, and its newlines. That of WIDE was shrunk."""
BASE = 81 + 1


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("onevision")
    checkpoint = onevision_checkpoint.write(folder / "tiny-onevision")
    live = Live(
        checkpoint,
        folder,
        "--max-model-len",
        "2048",
        "--withdraw-layer",
        "2",
        "--several-images",
        "base",
        "--video-frames",
        "8",
    )
    yield live
    live.end()


@pytest.fixture(scope="module")
def client(server: Live) -> OpenAI:
    return OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)


def images(usage: dict[str, Any]) -> list[tuple[int, int, str]]:
    return [(found["encoded"], found["kept"], found["method"]) for found in usage["vision_tokens"]["images"]]


def test_two_images_of_different_size_and_detail(client: OpenAI) -> None:
    """Twice: the second time the images are cached. Low detail is the base tile alone."""
    for _ in range(2):
        usage = ask(client, image(WIDE, "low"), image(SMALL, "high"))
        assert images(usage) == [(ENCODED[WIDE], BASE, "base_only"), (ENCODED[SMALL], ENCODED[SMALL], "none")]


def test_an_image_alone_has_all_its_tiles_and_of_several_each_its_base(client: OpenAI) -> None:
    assert ask(client, image(WIDE))["vision_tokens"]["kept"] == ENCODED[WIDE]
    both = ask(client, image(WIDE), image(SMALL))
    assert images(both) == [(ENCODED[WIDE], BASE, "base_only"), (ENCODED[SMALL], BASE, "base_only")]
    assert both["prompt_tokens"] - ask(client, image(SMALL, "low"))["prompt_tokens"] == BASE + 1  # and a line break


def test_a_prompt_is_as_long_as_the_plan_says(client: OpenAI) -> None:
    whole, half = ask(client, image(WIDE)), ask(client, image(WIDE), reduction_ratio=0.5)
    assert whole["prompt_tokens"] - half["prompt_tokens"] == 81 // 2 + 23 * 31 // 2
    assert half["vision_tokens"]["kept"] == ENCODED[WIDE] - 81 // 2 - 23 * 31 // 2


def test_what_is_left_of_the_base_tile_is_withdrawn(client: OpenAI) -> None:
    asked = {"method": "base_only+folder", "ratio": 0.5, "withdraw": True}
    vision = ask(client, image(WIDE), reduction=asked)["vision_tokens"]
    assert vision["withdrawn"] == vision["kept"] == BASE - 81 // 2
    assert vision["method"] == "base_only+folder"


VIDEO = videos.video(40, 200, 120)
FRAME = 5 * 5
"""Tokens of a frame; a newline ends the video."""


def test_a_video_beside_images(client: OpenAI) -> None:
    """Low detail is a ratio there. Of several images, the base tiles are meant, not of an image and a video."""
    for _ in range(2):
        usage = ask(client, image(SMALL), clip(VIDEO, "low"), clip(VIDEO))["vision_tokens"]
        assert [found["kept"] for found in usage["images"]] == [ENCODED[SMALL]]
        assert [found["kept"] for found in usage["videos"]] == [8 * (FRAME - FRAME * 3 // 4) + 1, 8 * FRAME + 1]


def test_a_video_in_squares_and_withdrawn(client: OpenAI) -> None:
    """7 x 7 tokens of a frame pool to 4 x 4."""
    asked = {"method": "illava", "layers": [1, 2], "ratio": 0.4, "withdraw": True}
    (found,) = ask(client, clip(VIDEO), reduction=asked)["vision_tokens"]["videos"]
    assert (found["kept"], found["withdrawn"]) == (8 * 16 + 1, 8 * 16 + 1)
    with pytest.raises(BadRequestError, match="videos have no base tile") as caught:
        ask(client, clip(VIDEO), reduction={"method": "base_only"})
    assert caught.value.param == "reduction.method"


def test_illava_in_squares(client: OpenAI) -> None:
    """7 x 7 of 9 x 9 tokens of a tile are left, so the mosaic is one of such tiles."""
    asked: dict[str, Any] = {"method": "illava", "layers": [1, 2], "ratio": 0.4, "decoder": True}
    vision = ask(client, image(SMALL), reduction=asked)["vision_tokens"]
    assert vision["kept"] == 49 + 7 * 5 + 7
    assert vision["withdrawn"] == round(vision["kept"] * 0.3)
    with pytest.raises(BadRequestError, match=r"give ratio 0.5556 \(36 tokens of 81\)") as caught:
        ask(client, image(SMALL), reduction=asked | {"ratio": 0.5})
    assert caught.value.param == "reduction.ratio"


def test_a_ratio_that_one_part_can_not_take_names_the_image_and_the_part(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as caught:
        ask(client, image(WIDE), image(SMALL), reduction={"ratio": 0.985})
    assert caught.value.param == "reduction.ratio"
    assert "image 2 of 2: the mosaic of tiles: ratio 0.985 would remove 62 of 63 vision tokens" in caught.value.message


def test_what_tiles_can_not_do_is_refused_before_they_are_fetched(client: OpenAI) -> None:
    never: Any = {"type": "image_url", "image_url": {"url": "http://203.0.113.1/never-asked.png"}}
    with pytest.raises(BadRequestError, match="leaves no grid of tokens in a tile") as caught:
        ask(client, never, reduction={"method": "tome", "ratio": 0.5})
    assert caught.value.param == "reduction.method"


def test_the_catalog(server: Live) -> None:
    catalog = server.ask("GET", "/v1/reducers").json
    assert catalog["vision_tokens_per_image"] is None
    assert catalog["limits"]["image"] == {"max_tokens": 999}
    assert catalog["limits"]["video"]["frames"] == 8
    assert catalog["low_detail"] == {"method": "base_only"}
    removed = {method["id"]: method["max_removed_tokens"] for method in catalog["data"]}
    in_the_decoder = {"withdraw", "fastv", "illava_decoder"}
    of_videos = {"vidcom2", "evs"}
    of_images = {"base_only", "downsample", "illava", "folder", "random", "pool", "divprune", "cdpruner"}
    assert removed.keys() == of_images | of_videos | in_the_decoder
    assert removed["base_only"] == 999 - BASE
