"""Images, workloads and traces."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from foldserve.loadtest.images import Images
from foldserve.loadtest.trace import read_trace
from foldserve.loadtest.workloads import WORKLOADS, SourceFactory
from foldserve.server.api.media import data_url
from foldserve.server.api.media.budget import MediaBudget
from foldserve.server.limits import Limits
from foldserve.server.video.decoder import VideoDecoder
from foldserve.server.video.frames import FrameRule

IMAGES = Images(56)


def opened(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def test_images_differ_unless_repeats_are_asked_for() -> None:
    assert opened(IMAGES.url(3)).size == (56, 56)
    assert IMAGES.url(3) == IMAGES.url(3)
    assert len({IMAGES.url(number) for number in range(50)}) == 50
    assert len({Images(56, repeat=4).url(number) for number in range(50)}) == 4


def test_videos_differ_and_are_videos() -> None:
    chats = WORKLOADS["video"].make(SourceFactory(IMAGES, words=5).source("a"), 3)
    urls = [chat[0]["content"][0]["video_url"]["url"] for chat in chats]
    assert len(set(urls)) == 3
    decoder, limits = VideoDecoder(), Limits()
    chosen, frames = decoder.decode(
        data_url.read(urls[0], MediaBudget(limits), "video"), limits.video_bounds, FrameRule(9)
    )
    decoder.close()
    assert (chosen.file_frames, chosen.seconds, frames.pixels.shape) == (32, 4.0, (9, 56, 56, 3))
    assert len({frame.tobytes() for frame in frames.pixels}) == 9


def test_a_folder_smaller_than_the_run_gives_new_images(tmp_path: Path) -> None:
    for name in ("a.png", "b.jpg"):
        Image.new("RGB", (40, 30), "red" if name == "a.png" else "blue").save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    urls = [Images(0, tmp_path).url(number) for number in range(20)]
    assert len({opened(url).tobytes() for url in urls}) == 20  # not only other files: other pixels
    assert opened(urls[0]).size == (40, 30)
    assert len({Images(0, tmp_path, repeat=2).url(number) for number in range(20)}) == 2
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images in"):
        Images(0, empty)


@pytest.mark.parametrize(
    ("name", "images", "messages"),
    [
        ("chat", [1, 1, 1, 1, 1, 1], [1] * 6),
        ("images", [3] * 6, [1] * 6),
        ("mix", [0, 1, 0, 1, 0, 1], [1] * 6),
        ("turns", [1] * 6, [1, 1, 3, 3, 5, 5]),
        ("long", [1] * 6, [1] * 6),
        ("bursts", [1] * 6, [1] * 6),
    ],
)
def test_workloads(name: str, images: list[int], messages: list[int]) -> None:
    maker = SourceFactory(IMAGES, words=5)
    chats = WORKLOADS[name].make(maker.source("a"), 6)
    assert [json.dumps(chat).count('"image_url":') for chat in chats] == images
    assert [len(chat) for chat in chats] == messages
    assert WORKLOADS[name].make(maker.source("a"), 6) == chats
    other = WORKLOADS[name].make(maker.source("b"), 6)
    shared = {json.dumps(chat) for chat in chats} & {json.dumps(chat) for chat in other}
    assert not shared


def test_turns_go_on_with_the_same_image() -> None:
    chats = WORKLOADS["turns"].make(SourceFactory(IMAGES, words=5).source("a"), 8)
    for turn in range(1, 4):
        assert chats[2 * turn][: len(chats[2 * turn - 2])] == chats[2 * turn - 2]


def test_a_trace_is_read_in_order_and_checked(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp_s": 7.5, "output_tokens": 3, "images": 2, "words": 4},
        {"timestamp_s": 7.0, "output_tokens": 1, "messages": [{"role": "user", "content": "hello"}]},
    ]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    first, second = read_trace(file)
    source = SourceFactory(IMAGES, words=5).source("a")
    assert first.chat(source) == [{"role": "user", "content": "hello"}]
    assert [part["type"] for part in second.chat(source)[0]["content"]] == ["image_url", "image_url", "text"]
    file.write_text('{"timestamp_s": 1}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_trace(file)
    file.write_text("")
    with pytest.raises(ValueError, match="holds no requests"):
        read_trace(file)
