"""Qwen3-VL over HTTP: images of any size, videos, `detail`, positions that the family keeps by default, withdrawal."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from tests import qwen_checkpoint, videos
from tests.api.live import Live, chat
from tests.images import data_uri, page, photo

SMALL, WIDE = (64, 64), (480, 256)
OPTIONS = ("--max-model-len", "2048", "--withdraw-layer", "4", "--video-frames", "8", "--max-video-seconds", "30")
PRIVATE = ("--allow-media-private-host", "127.0.0.1")
ENCODED = {SMALL: 2 * 2, WIDE: 8 * 15}
"""A token is 32 x 32 pixels."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("qwen")
    checkpoint = qwen_checkpoint.write(folder / "tiny-qwen3-vl", "qwen3_vl")
    live = Live(checkpoint, folder, *OPTIONS, *PRIVATE)
    yield live
    live.end()


@pytest.fixture(scope="module")
def client(server: Live) -> OpenAI:
    return OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)


def image(size: tuple[int, int], detail: str = "auto") -> Any:
    return {"type": "image_url", "image_url": {"url": data_uri(photo(sum(size), *size)), "detail": detail}}


def drawn(size: tuple[int, int]) -> Any:
    return {"type": "image_url", "image_url": {"url": data_uri(page(1, *size))}}


def clip(content: bytes, detail: str = "auto") -> Any:
    return {"type": "video_url", "video_url": {"url": videos.data_uri(content), "detail": detail}}


def ask(client: OpenAI, *media: Any, **fields: Any) -> Any:
    """The usage that a stream ends with."""
    messages: Any = [{"role": "user", "content": [*media, {"type": "text", "text": "What is it?"}]}]
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


def test_pixels_decide_and_usage_says_how_many_stay(client: OpenAI) -> None:
    """A prompt is as much shorter as usage says; of a photo all stays, and of a video nothing is decided so."""
    asked = {"method": "pixelprune", "tau": 8}
    whole, pruned = (ask(client, drawn(WIDE), **fields) for fields in ({}, {"reduction": asked}))
    vision = pruned["vision_tokens"]
    assert (vision["method"], vision["positions"], vision["encoded"]) == ("pixelprune", "keep", ENCODED[WIDE])
    assert 20 < vision["kept"] < 80
    assert whole["prompt_tokens"] - pruned["prompt_tokens"] == ENCODED[WIDE] - vision["kept"]
    both = ask(client, drawn(WIDE), reduction=asked | {"method": "pixelprune+folder+withdraw", "ratio": 0.9})
    assert (both["vision_tokens"]["kept"], both["vision_tokens"]["withdrawn"]) == (12, 12)
    least = ask(client, drawn(WIDE), reduction=asked | {"keep_tokens": 100})
    assert least["vision_tokens"]["kept"] == 100
    assert ask(client, image(WIDE), reduction=asked)["vision_tokens"]["method"] == "none"
    for refused in (asked | {"tau": 256}, asked | {"tau": True}):
        with pytest.raises(BadRequestError, match="tau must be an integer of 0 to 255") as caught:
            ask(client, drawn(WIDE), reduction=refused)
        assert caught.value.param == "reduction.tau"
    with pytest.raises(BadRequestError, match="'pixelprune' is for images") as caught:
        ask(client, clip(VIDEO), reduction=asked)
    assert caught.value.param == "reduction.method"


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
    assert "image 2 of 2: ratio 0.75 would remove 3 of 4 vision tokens" in caught.value.message


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
    of_videos = {"frames": 8, "fps": None, "max_seconds": 30}
    assert catalog["limits"] == {"image": {"max_tokens": 256}, "video": of_videos}
    assert catalog["positions"] == {"default": "keep", "can_keep": True}
    offered = {method["id"] for method in catalog["data"]}
    in_the_decoder = {"withdraw", "fastv", "illava_decoder"}
    in_the_tower = {"downsample", "illava", "tome", "visionzip", "pixelprune"}
    behind_it = {"folder", "random", "pool", "divprune", "cdpruner", "mmtok"}
    assert offered == in_the_tower | behind_it | in_the_decoder


VIDEO = videos.video(40, 256, 128)  # four seconds; the largest frames that the tiny model takes
GROUP = 8 * 4
"""Tokens of two of its frames."""


def test_a_video_has_the_frames_that_the_server_takes(client: OpenAI) -> None:
    whole, half = ask(client, clip(VIDEO)), ask(client, clip(VIDEO), reduction_ratio=0.5)
    assert whole["vision_tokens"]["videos"] == [entry(4 * GROUP, 4 * GROUP)]
    assert half["vision_tokens"]["videos"] == [entry(4 * GROUP, 4 * GROUP // 2, "folder")]
    assert whole["prompt_tokens"] - half["prompt_tokens"] == 4 * GROUP // 2


def test_a_map_says_when_the_frames_of_a_video_are_shown(server: Live) -> None:
    """Two pictures make a frame: of those taken, 0, 8, 16, 25, 33, 42, 50 and 59, every second one."""
    body = chat("what?", clip(videos.video(60)), image(SMALL), reduction={"ratio": 0.5})
    of_video, of_image = server.ask("POST", "/v1/reductions/map", body).json["items"]
    assert of_video["seconds"] == [0.0, 1.6, 3.3, 5.0] and len(of_video["grids"]) == 4
    assert "seconds" not in of_image


def test_a_video_and_images_in_one_chat(client: OpenAI) -> None:
    """Each with a reduction of its own, in the order of the prompt; twice, the second time from the caches."""
    for _ in range(2):
        vision = ask(client, image(WIDE, "low"), clip(VIDEO, "low"), image(SMALL), clip(VIDEO))["vision_tokens"]
        assert [found["kept"] for found in vision["images"]] == [4 * 7, ENCODED[SMALL]]
        assert [found["kept"] for found in vision["videos"]] == [4 * GROUP // 4, 4 * GROUP]
        assert vision["encoded"] == ENCODED[WIDE] + ENCODED[SMALL] + 8 * GROUP


def test_a_list_of_pictures_is_a_video(client: OpenAI) -> None:
    pictures = [data_uri(photo(i, 256, 128)).removeprefix("data:image/jpeg;base64,") for i in range(6)]
    part: Any = {"type": "video_url", "video_url": {"url": "data:video/jpeg;base64," + ",".join(pictures)}}
    assert ask(client, part, reduction_ratio=0.5)["vision_tokens"]["videos"] == [
        entry(3 * GROUP, 3 * GROUP // 2, "folder")
    ]
    part["video_url"]["url"] += "," + ",".join(pictures)
    with pytest.raises(BadRequestError, match="the list has 12 pictures: at most 8 frames"):
        ask(client, part)


def test_a_prompt_that_is_too_long_says_what_would_fit(client: OpenAI) -> None:
    """Sixteen of the largest images and two videos; with the ratio that is named it fits."""
    many = [*[image((512, 512))] * 8, clip(VIDEO), clip(VIDEO)]
    with pytest.raises(BadRequestError) as caught:
        ask(client, *many)
    assert f"vision tokens (image: 256, image: 256, image: 256, image: 256, video: 4 frames of {GROUP}" in str(
        caught.value
    )
    (ratio,) = re.findall(r"a ratio of (0\.\d+) would fit", str(caught.value))
    assert ask(client, *many, reduction_ratio=float(ratio))["prompt_tokens"] < 2048
    with pytest.raises(BadRequestError):
        ask(client, *many, reduction_ratio=float(ratio) - 0.02)


def test_a_withdrawn_video_leaves_the_decoder(client: OpenAI) -> None:
    vision = ask(client, clip(VIDEO), image(WIDE), reduction={"withdraw": True})["vision_tokens"]
    assert vision["withdrawn"] == 4 * GROUP + ENCODED[WIDE]


def test_what_a_video_can_not_have_is_refused(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="makes images smaller, not videos") as caught:
        ask(client, clip(VIDEO), reduction={"method": "downsample", "ratio": 0.5})
    assert caught.value.param == "reduction.method"
    with pytest.raises(BadRequestError, match="puts text between a video's frames") as caught:
        ask(client, clip(VIDEO), reduction={"method": "vidcom2", "ratio": 0.5})
    assert caught.value.param == "reduction.method"


BAD_VIDEOS = {
    "damaged": (VIDEO[: len(VIDEO) // 2], "invalid_video", "damaged or cut short"),
    "an image": (b"\x89PNG\r\n\x1a\n" + bytes(99), "invalid_video", "no MP4 or WebM"),
    "too long": (videos.video(4, times=[0, 1, 2, 40]), "limit_exceeded", "takes 40 s: at most 30 s"),
}


@pytest.mark.parametrize(("content", "code", "why"), BAD_VIDEOS.values(), ids=BAD_VIDEOS)
def test_a_bad_video_is_the_clients_error(client: OpenAI, content: bytes, code: str, why: str) -> None:
    with pytest.raises(BadRequestError, match=why) as caught:
        ask(client, image(SMALL), clip(content))
    assert (caught.value.code, caught.value.param) == (code, "messages[0].content[1].video_url.url")
    assert ask(client, image(SMALL))["vision_tokens"]["kept"] == ENCODED[SMALL]


def test_a_decoder_that_dies_costs_nobody_else(server: Live, client: OpenAI) -> None:
    """The process that decoders are forked from is killed while others are served; the next video has a new one."""
    ask(client, clip(VIDEO))
    (fork_server,) = (each for each in server.tree() if "video.fork_server" in " ".join(each.cmdline()))
    fork_server.kill()
    assert ask(client, image(SMALL))["vision_tokens"]["kept"] == ENCODED[SMALL]
    assert ask(client, clip(VIDEO))["vision_tokens"]["kept"] == 4 * GROUP


def test_bad_videos_beside_good_ones(client: OpenAI) -> None:
    def one(number: int) -> int:
        if number % 2:
            with pytest.raises(BadRequestError):
                ask(client, clip(VIDEO[: 200 + 97 * number]))
            return 0
        return int(ask(client, clip(VIDEO))["vision_tokens"]["kept"])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(16))) == [4 * GROUP, 0] * 8


def test_videos_are_fetched_like_images(client: OpenAI) -> None:
    never: Any = {"type": "video_url", "video_url": {"url": "http://10.0.0.1/a.mp4"}}
    with pytest.raises(BadRequestError) as caught:
        ask(client, never)
    assert (caught.value.code, caught.value.param) == ("refused_video_url", "messages[0].content[0].video_url.url")


class _Files(BaseHTTPRequestHandler):
    """A video, the same with a length that lies, and one that never ends."""

    def do_GET(self) -> None:
        self.send_response(200)
        if self.path == "/short":
            self.send_header("Content-Length", str(2 * len(VIDEO)))
        self.end_headers()
        self.wfile.write(VIDEO)
        with suppress(OSError):
            while self.path == "/endless":
                self.wfile.write(bytes(1 << 20))

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Files) as files:
        Thread(target=files.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{files.server_port}"
        files.shutdown()


def test_a_video_by_its_url(client: OpenAI, web: str) -> None:
    def by_url(path: str) -> Any:
        return {"type": "video_url", "video_url": {"url": web + path}}

    assert ask(client, by_url("/"))["vision_tokens"]["kept"] == 4 * GROUP
    with pytest.raises(BadRequestError, match="the video's server broke off") as caught:
        ask(client, by_url("/short"))
    assert caught.value.code == "video_unavailable"
    with pytest.raises(BadRequestError, match="files are larger than 50 MB together") as caught:
        ask(client, by_url("/endless"))
    assert caught.value.code == "limit_exceeded"


def test_vision_tokens_are_counted_by_modality(server: Live, client: OpenAI) -> None:
    def kept() -> float:
        return server.metrics("foldserve_vision_tokens_total", stage="kept", method="folder", modality="video")

    before = kept()
    ask(client, clip(VIDEO), reduction_ratio=0.5)
    assert kept() - before == 4 * GROUP // 2


def entry(encoded: int, kept: int, method: str = "none") -> dict[str, object]:
    ratio = 1 - kept / encoded
    return {"encoded": encoded, "kept": kept, "withdrawn": 0, "method": method, "ratio": ratio}
