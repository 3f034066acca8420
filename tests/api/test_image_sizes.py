"""A model that makes more tokens of larger images: plans, refusals and limits over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import next_checkpoint
from tests.api.live import Answer, Live
from tests.images import data_uri, photo

SMALL, WIDE, LARGE = (150, 150), (640, 130), (700, 560)
ENCODED = {SMALL: 144 + 12 * 12 + 12, WIDE: 144 + 8 * 36 + 8, LARGE: 144 + 20 * 24 + 20}
"""Of a tile of 12 x 12 tokens and a mosaic, each row with its newline."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_llava: Path) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("next")
    checkpoint = next_checkpoint.write(folder / "tiny-next", tiny_llava)
    live = Live(checkpoint, folder, "--max-model-len", "2048", "--withdraw-layer", "2")
    yield live
    live.end()


def ask(server: Live, *sizes: tuple[int, int], **fields: Any) -> Answer:
    parts = [{"type": "image_url", "image_url": {"url": data_uri(photo(sum(size), *size))}} for size in sizes]
    return server.chat("What is it?", *parts, **fields)


@pytest.mark.parametrize("size", ENCODED)
def test_usage_is_that_of_the_images_size(server: Live, size: tuple[int, int]) -> None:
    whole = ask(server, size).json["usage"]
    assert whole["vision_tokens"]["encoded"] == whole["vision_tokens"]["kept"] == ENCODED[size]
    half = ask(server, size, reduction_ratio=0.5).json["usage"]
    newlines = {SMALL: 12, WIDE: 8, LARGE: 20}[size]
    kept = (ENCODED[size] - newlines) // 2 + newlines
    assert (half["vision_tokens"]["encoded"], half["vision_tokens"]["kept"]) == (ENCODED[size], kept)
    assert whole["prompt_tokens"] - half["prompt_tokens"] == ENCODED[size] - kept


def test_images_of_several_sizes_are_reported_one_by_one(server: Live) -> None:
    for _ in range(2):  # the second time the images are cached
        vision = ask(server, SMALL, LARGE, reduction={"ratio": 0.25, "withdraw": True}).json["usage"]["vision_tokens"]
        assert [image["encoded"] for image in vision["images"]] == [ENCODED[SMALL], ENCODED[LARGE]]
        assert vision["withdrawn"] == vision["kept"] == sum(image["kept"] for image in vision["images"])


def test_an_amount_that_only_a_large_image_can_keep(server: Live) -> None:
    asked = {"reduction": {"keep_tokens": 400}}
    assert ask(server, LARGE, **asked).json["usage"]["vision_tokens"]["kept"] == 400
    refused = ask(server, SMALL, **asked)
    assert refused.status == 400
    error = refused.json["error"]
    assert (error["param"], error["type"]) == ("reduction.keep_tokens", "invalid_request_error")
    assert "give 16 to 300" in error["message"]


def test_a_refusal_of_a_size_names_the_short_field_too(server: Live) -> None:
    refused = ask(server, SMALL, reduction_ratio=0.999)
    assert (refused.status, refused.json["error"]["param"]) == (400, "reduction_ratio")


def test_what_no_image_allows_is_refused_before_it_is_fetched(server: Live) -> None:
    image = {"type": "image_url", "image_url": {"url": "http://203.0.113.1/never-asked.png"}}
    refused = server.chat("x", image, reduction={"method": "folder_cls", "ratio": 0.5})
    assert (refused.status, refused.json["error"]["param"]) == (400, "reduction.method")


def test_the_catalog_tells_the_limit_of_an_image(server: Live) -> None:
    catalog = server.ask("GET", "/v1/reducers").json
    assert catalog["vision_tokens_per_image"] is None
    assert catalog["limits"] == {"image": {"max_tokens": 144 + 24 * 24 + 24}}
    offered = {method["id"]: method["max_removed_tokens"] for method in catalog["data"]}
    assert offered["folder"] == 144 - 2 + 576 - 2
    assert not offered.keys() & {"folder_cls", "tome", "stf"}
    assert {"base_only", "downsample"} <= offered.keys()
