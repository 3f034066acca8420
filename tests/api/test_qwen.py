"""Qwen3-VL over HTTP: images of any size, `detail`, positions that the family keeps by default, withdrawal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from tests import qwen_checkpoint
from tests.api.live import Live
from tests.images import data_uri, photo

SMALL, WIDE = (64, 64), (480, 256)
ENCODED = {SMALL: 2 * 2, WIDE: 8 * 15}
"""A token is 32 x 32 pixels."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("qwen")
    checkpoint = qwen_checkpoint.write(folder / "tiny-qwen3-vl", "qwen3_vl")
    live = Live(checkpoint, folder, "--max-model-len", "2048", "--withdraw-layer", "4")
    yield live
    live.end()


@pytest.fixture(scope="module")
def client(server: Live) -> OpenAI:
    return OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)


def image(size: tuple[int, int], detail: str = "auto") -> Any:
    return {"type": "image_url", "image_url": {"url": data_uri(photo(sum(size), *size)), "detail": detail}}


def ask(client: OpenAI, *images: Any, **fields: Any) -> Any:
    """The usage that a stream ends with."""
    messages: Any = [{"role": "user", "content": [*images, {"type": "text", "text": "What is it?"}]}]
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=messages,
        max_tokens=4,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=fields,
    )
    *_, last = stream
    assert last.usage is not None
    return last.usage.to_dict()


def test_two_images_of_different_size_and_detail(client: OpenAI) -> None:
    """Twice: the second time the images are cached. Low detail is a smaller image, 0.75 fewer tokens by default."""
    for _ in range(2):
        vision = ask(client, image(WIDE, "low"), image(SMALL, "high"))["vision_tokens"]
        assert [found["encoded"] for found in vision["images"]] == [ENCODED[WIDE], ENCODED[SMALL]]
        assert [found["kept"] for found in vision["images"]] == [4 * 7, ENCODED[SMALL]]


def test_a_prompt_is_as_long_as_the_plan_says(client: OpenAI) -> None:
    whole, half = ask(client, image(WIDE)), ask(client, image(WIDE), reduction_ratio=0.5)
    assert half["vision_tokens"]["kept"] == ENCODED[WIDE] // 2
    assert whole["prompt_tokens"] - half["prompt_tokens"] == ENCODED[WIDE] // 2


def test_withdrawn_tokens_are_counted(client: OpenAI) -> None:
    vision = ask(client, image(WIDE), reduction={"ratio": 0.5, "withdraw": True})["vision_tokens"]
    assert vision["withdrawn"] == vision["kept"] == ENCODED[WIDE] // 2


def test_illava_in_the_tower_and_in_the_decoder(client: OpenAI) -> None:
    asked = {"method": "illava", "layers": [1, 2], "ratio": 0.5, "decoder": True}
    vision = ask(client, image(WIDE), reduction=asked)["vision_tokens"]
    assert (vision["kept"], vision["withdrawn"]) == (60, 18)
    with pytest.raises(BadRequestError, match="it runs 0 to 3") as caught:
        ask(client, image(WIDE), reduction=asked | {"layers": [3, 4]})
    assert caught.value.param == "reduction.layers"


def test_a_number_that_a_small_image_does_not_have_leaves_it_whole(client: OpenAI) -> None:
    vision = ask(client, image(SMALL), image(WIDE), reduction={"keep_tokens": 50})["vision_tokens"]
    assert [found["kept"] for found in vision["images"]] == [ENCODED[SMALL], 50]


def test_a_ratio_that_one_image_can_not_take_names_the_image(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as caught:
        ask(client, image(WIDE), image(SMALL), reduction={"ratio": 0.75})
    assert caught.value.param == "reduction.ratio"
    assert "image 2 of 2: ratio 0.75 would remove 3 of this image's 4 vision tokens" in caught.value.message


def test_a_strip_that_the_image_processor_would_not_take(client: OpenAI) -> None:
    """At 200 to 1: the server's own bound for any image comes first."""
    with pytest.raises(BadRequestError, match="a side may be 50 times the other"):
        ask(client, image((9000, 44)))


def test_what_the_tower_can_not_do_is_refused_before_it_is_fetched(client: OpenAI) -> None:
    never: Any = {"type": "image_url", "image_url": {"url": "http://203.0.113.1/never-asked.png"}}
    with pytest.raises(BadRequestError) as caught:
        ask(client, never, reduction={"method": "folder_cls", "ratio": 0.5})
    assert caught.value.param == "reduction.method"


def test_the_catalog(server: Live) -> None:
    catalog = server.ask("GET", "/v1/reducers").json
    assert catalog["vision_tokens_per_image"] is None
    assert catalog["limits"] == {"image": {"max_tokens": 256}}
    assert catalog["positions"] == {"default": "keep", "can_keep": True}
    offered = {method["id"] for method in catalog["data"]}
    in_the_decoder = {"withdraw", "fastv", "illava_decoder"}
    assert offered == {"downsample", "illava", "tome", "folder", "random", "pool"} | in_the_decoder
