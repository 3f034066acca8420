"""Video-LLaVA over HTTP: a video has the frames that the model was trained with, whatever the server's default."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from tests import video_checkpoint, videos
from tests.api.live import Live
from tests.images import data_uri, photo

FRAMES, IMAGE, FRAME = video_checkpoint.FRAMES, 144, 145
CLIP = videos.video(20, 96, 72)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("video-llava")
    checkpoint = video_checkpoint.write_video_llava(folder / "tiny-video-llava")
    live = Live(checkpoint, folder, "--max-model-len", "2048", "--withdraw-layer", "2")
    yield live
    live.end()


@pytest.fixture(scope="module")
def client(server: Live) -> OpenAI:
    return OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)


def image(seed: int, detail: str = "auto") -> Any:
    return {"type": "image_url", "image_url": {"url": data_uri(photo(seed, 96, 64)), "detail": detail}}


def clip(content: bytes = CLIP, detail: str = "auto") -> Any:
    return {"type": "video_url", "video_url": {"url": videos.data_uri(content), "detail": detail}}


def ask(client: OpenAI, *media: Any, **fields: Any) -> Any:
    """The usage of an answer."""
    messages: Any = [{"role": "user", "content": [*media, {"type": "text", "text": "What is it?"}]}]
    name = client.models.list().data[0].id
    answer = client.chat.completions.create(model=name, messages=messages, max_tokens=4, extra_body=fields)
    assert answer.usage is not None
    return answer.usage.to_dict()


def test_a_video_has_the_models_number_of_frames(server: Live, client: OpenAI) -> None:
    """The default would be 32; class tokens stay whatever the ratio."""
    whole, half = ask(client, clip()), ask(client, clip(), reduction_ratio=0.5)
    (video,) = whole["vision_tokens"]["videos"]
    assert (video["encoded"], video["kept"]) == (FRAMES * FRAME, FRAMES * FRAME)
    assert half["vision_tokens"]["kept"] == FRAMES * (1 + 72)
    assert whole["prompt_tokens"] - half["prompt_tokens"] == FRAMES * 72
    limits = server.ask("GET", "/v1/reducers").json["limits"]
    assert limits["video"]["frames"] == FRAMES and limits["image"]["max_tokens"] == IMAGE
    assert f"4 videos of {FRAMES} frames" in " ".join(server.out.read_text().split())


def test_images_and_videos_of_several_lengths_in_one_chat(client: OpenAI) -> None:
    """Twice: the second time from the caches."""
    for _ in range(2):
        vision = ask(client, image(1, "low"), clip(detail="low"), image(2), clip(videos.video(2, 96, 72)))[
            "vision_tokens"
        ]
        assert [found["kept"] for found in vision["images"]] == [IMAGE // 4, IMAGE]
        assert [found["kept"] for found in vision["videos"]] == [FRAMES * (1 + 36), 2 * FRAME]


def test_what_works_on_images_alone_is_refused_of_a_video_before_it_is_fetched(client: OpenAI) -> None:
    asked = {"method": "tome", "ratio": 0.5}
    assert ask(client, image(1), reduction=asked)["vision_tokens"]["kept"] == IMAGE // 2
    never: Any = {"type": "video_url", "video_url": {"url": "http://203.0.113.1/never-asked.mp4"}}
    with pytest.raises(BadRequestError) as caught:
        ask(client, never, reduction=asked)
    assert caught.value.param == "reduction.method"


@pytest.mark.parametrize("method", ["evs", "vidcom2"])
def test_a_method_that_chooses_among_all_frames(server: Live, client: OpenAI, method: str) -> None:
    """Of the patches of the whole video; the class tokens stay. Twice: the second time from the caches."""
    whole = ask(client, clip())["prompt_tokens"]
    for ratio in (0.3, 0.3, 0.55):
        usage = ask(client, clip(), clip(videos.video(2, 96, 72)), reduction={"method": method, "ratio": ratio / 2})
        found = [(video["method"], video["encoded"], video["kept"]) for video in usage["vision_tokens"]["videos"]]
        assert found == [
            (method, frames * FRAME, frames * FRAME - int(frames * (FRAME - 1) * ratio / 2)) for frames in (FRAMES, 2)
        ]
        usage = ask(client, clip(), reduction={"method": method, "ratio": ratio})
        assert whole - usage["prompt_tokens"] == int(FRAMES * (FRAME - 1) * ratio)
    assert server.metrics("foldserve_vision_tokens_total", stage="kept", method=method, modality="video")


def test_a_method_of_videos_is_refused_of_images_and_where_less_than_it_keeps_is_left(client: OpenAI) -> None:
    asked = {"method": "evs", "ratio": 0.9}
    for media, told in (([clip(), image(1)], "is for videos"), ([clip()], "keeps the first frame of a video")):
        with pytest.raises(BadRequestError, match=told) as caught:
            ask(client, *media, reduction=asked)
        assert caught.value.param in ("reduction.method", "reduction.ratio")


def test_the_catalog_says_what_a_method_reduces(server: Live) -> None:
    offered = {method["id"]: method["modalities"] for method in server.ask("GET", "/v1/reducers").json["data"]}
    assert offered["folder"] == offered["withdraw"] == ["image", "video"]
    assert offered["tome"] == offered["downsample"] == ["image"]
    assert offered["evs"] == offered["vidcom2"] == ["video"]


def test_a_withdrawn_video_leaves_the_decoder(client: OpenAI) -> None:
    vision = ask(client, clip(), image(1), reduction={"ratio": 0.5, "withdraw": True})["vision_tokens"]
    assert vision["withdrawn"] == vision["kept"] == FRAMES * (1 + 72) + 72
