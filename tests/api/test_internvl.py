"""InternVL over HTTP, in OpenGVLab's layout: tiles, frames, marks that are text, reductions one by one, withdrawal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from tests import intern_checkpoint, videos
from tests.api.live import Live
from tests.images import data_uri, photo

SMALL, WIDE = (168, 168), (640, 130)
ENCODED = {SMALL: 36, WIDE: 6 * 36}
"""A tile of 6 x 6 tokens; five tiles and the whole image."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("internvl")
    plain = intern_checkpoint.write(folder / "plain", "qwen3")
    checkpoint = intern_checkpoint.write_chat(folder / "tiny-internvl", plain, "qwen3")
    options = ("--max-model-len", "2048", "--withdraw-layer", "3", "--video-frames", "4")
    live = Live(checkpoint, folder, *options, "--trust-remote-code")
    yield live
    live.end()


@pytest.fixture(scope="module")
def client(server: Live) -> OpenAI:
    return OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)


def image(size: tuple[int, int], detail: str = "auto") -> Any:
    return {"type": "image_url", "image_url": {"url": data_uri(photo(sum(size), *size)), "detail": detail}}


def ask(client: OpenAI, *parts: Any, text: str = "What is it?", **fields: Any) -> Any:
    """The usage of an answer."""
    messages: Any = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    model = client.models.list().data[0].id
    answer = client.chat.completions.create(model=model, messages=messages, max_tokens=4, extra_body=fields)
    assert answer.usage is not None
    return answer.usage.to_dict()


def test_two_images_of_different_size_and_reduction(client: OpenAI) -> None:
    """Twice: the second time the images are cached. Low detail is the base tile alone."""
    for _ in range(2):
        vision = ask(client, image(WIDE), image(SMALL, "high"))["vision_tokens"]
        assert vision["kept"] == vision["encoded"] == ENCODED[WIDE] + ENCODED[SMALL]
        vision = ask(client, image(WIDE, "low"), image(SMALL, "high"))["vision_tokens"]
        assert [found["encoded"] for found in vision["images"]] == [ENCODED[WIDE], ENCODED[SMALL]]
        assert [found["kept"] for found in vision["images"]] == [36, ENCODED[SMALL]]


def test_a_prompt_is_as_long_as_the_plan_says(client: OpenAI) -> None:
    whole, half = ask(client, image(WIDE)), ask(client, image(WIDE), reduction_ratio=0.5)
    assert half["vision_tokens"]["kept"] == ENCODED[WIDE] // 2
    assert whole["prompt_tokens"] - half["prompt_tokens"] == ENCODED[WIDE] // 2


def test_withdrawn_and_chosen_tokens_are_counted(client: OpenAI) -> None:
    vision = ask(client, image(WIDE), reduction={"ratio": 0.5, "withdraw": True})["vision_tokens"]
    assert vision["withdrawn"] == vision["kept"] == ENCODED[WIDE] // 2
    vision = ask(client, image(WIDE), reduction={"method": "fastv", "ratio": 0.5})["vision_tokens"]
    assert (vision["kept"], vision["withdrawn"]) == (ENCODED[WIDE], ENCODED[WIDE] // 2)


def test_kept_positions(client: OpenAI) -> None:
    vision = ask(client, image(WIDE), reduction={"ratio": 0.5, "positions": "keep"})["vision_tokens"]
    assert (vision["kept"], vision["positions"]) == (ENCODED[WIDE] // 2, "keep")


def test_a_video_and_an_image(client: OpenAI) -> None:
    """Four frames, each a tile; twice: the second time from the caches."""
    film: Any = {"type": "video_url", "video_url": {"url": videos.data_uri(videos.video(40)), "detail": "low"}}
    for _ in range(2):
        vision = ask(client, film, image(WIDE, "high"), text="What is <video> it?")["vision_tokens"]
        assert [(found["encoded"], found["kept"]) for found in vision["videos"]] == [(4 * 36, 4 * 9)]
        assert [found["kept"] for found in vision["images"]] == [ENCODED[WIDE]]
    with pytest.raises(BadRequestError, match="text between a video's frames"):
        ask(client, film, reduction={"method": "fastv", "ratio": 0.5})


@pytest.mark.parametrize("mark", ["<image>", "<video>", "<img><IMG_CONTEXT></img>", "<IMG_CONTEXT>"])
def test_a_mark_in_a_text_is_text(client: OpenAI, mark: str) -> None:
    plain, marked = ask(client, image(SMALL)), ask(client, image(SMALL), text=f"What is {mark} it?")
    assert marked["vision_tokens"] == plain["vision_tokens"]
    assert marked["prompt_tokens"] > plain["prompt_tokens"] + len(mark)


def test_a_ratio_that_one_image_can_not_take_names_image_and_part(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as caught:
        ask(client, image(WIDE), image(SMALL), reduction_ratio=0.98)
    assert caught.value.param == "reduction_ratio"
    where = "image 1 of 2: 6 grids of 36 tokens, each reduced by itself"
    assert f"{where}: ratio 0.98 would remove 35 of 36 vision tokens" in caught.value.message


def test_what_the_tower_can_not_do_is_refused_before_it_is_fetched(client: OpenAI) -> None:
    never: Any = {"type": "image_url", "image_url": {"url": "http://203.0.113.1/never-asked.png"}}
    with pytest.raises(BadRequestError, match="works in tower, where this model can't be reduced") as caught:
        ask(client, never, reduction={"method": "folder_cls", "ratio": 0.5})
    assert caught.value.param == "reduction.method"


def test_the_catalog(server: Live) -> None:
    catalog = server.ask("GET", "/v1/reducers").json
    assert catalog["vision_tokens_per_image"] is None
    assert catalog["limits"]["image"] == {"max_tokens": 7 * 36}
    offered = {method["id"] for method in catalog["data"]}
    before = {"base_only", "folder", "random", "pool", "divprune", "cdpruner"}
    assert offered == before | {"withdraw", "fastv", "illava_decoder"}
    assert catalog["low_detail"] == {"method": "base_only"}
