"""Video files as a server gets them: the right frames, or a clear refusal within the bounds."""

from __future__ import annotations

import os
import random
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from foldserve.server.video.decoder import DecoderUnavailable, VideoDecoder
from foldserve.server.video.frames import ChosenFrames, DamagedVideo, FrameRule, VideoBounds, VideoError, VideoTooLarge
from tests.videos import joined, numbers, video

BOUNDS = VideoBounds(seconds=60, frame_pixels=640 * 480, pixels=40 * 640 * 480, file_frames=3000, work_s=5)
EIGHT = FrameRule(8)
EVENLY = [0, 8, 16, 25, 33, 42, 50, 59]  # of 60


@pytest.fixture(scope="module")
def decoder() -> Iterator[VideoDecoder]:
    decoder = VideoDecoder()
    yield decoder
    decoder.close()


def taken(decoder: VideoDecoder, content: bytes, rule: FrameRule = EIGHT, bounds: VideoBounds = BOUNDS) -> list[int]:
    """Which frames; what is measured before is what comes."""
    chosen, frames = decoder.decode(content, bounds, rule)
    measured = decoder.measure(content, bounds, rule)
    assert frames.pixels.shape == (chosen.count, chosen.height, chosen.width, 3)
    assert replace(measured, height=chosen.height, width=chosen.width) == chosen
    assert sorted((measured.height, measured.width)) == sorted((chosen.height, chosen.width))
    return numbers(frames.pixels)


@pytest.mark.parametrize(
    ("codec", "container"),
    [(codec, "mp4") for codec in ("libx264", "libx265", "libsvtav1", "mpeg4")]
    + [(codec, "webm") for codec in ("libvpx", "libvpx-vp9")],
)
def test_evenly_spaced_frames_of_every_codec(decoder: VideoDecoder, codec: str, container: str) -> None:
    quality = {"qmin": "1", "qmax": "1"} if codec == "mpeg4" else {"b:v": "2M"}
    content = video(codec=codec, container=container, options={"x265-params": "log-level=none", **quality})
    assert taken(decoder, content) == EVENLY


def test_frames_are_found_across_key_frames_and_open_groups(decoder: VideoDecoder) -> None:
    content = video(options={"g": "12", "bf": "3", "x264-params": "open-gop=1"})
    assert taken(decoder, content) == EVENLY
    assert taken(decoder, content, FrameRule(60)) == list(range(60))


def test_a_rate_takes_so_many_a_second(decoder: VideoDecoder) -> None:
    content = video()  # 6 s at 10 a second
    assert taken(decoder, content, FrameRule(32, fps=1.0)) == [0, 9, 19, 29, 39, 49, 59]
    assert len(taken(decoder, content, FrameRule(4, fps=1.0))) == 4


def test_frames_of_uneven_times_are_those_shown_then(decoder: VideoDecoder) -> None:
    times = [0, 0.1, 0.2, 0.3, 5, 5.1, 5.2, 5.3, 10]
    content = video(len(times), times=times)
    assert taken(decoder, content, FrameRule(5)) == [0, 3, 4, 7, 8]  # at 0, 2.5, 5, 7.5 and 10 s
    chosen = decoder.measure(content, BOUNDS, FrameRule(5))
    assert chosen.times == pytest.approx([0, 0.3, 5, 5.3, 10], abs=1e-3)
    meta = chosen.metadata()
    places, fps = meta["frames_indices"], meta["fps"]
    assert isinstance(places, list) and isinstance(fps, float)
    assert [place / fps for place in places] == pytest.approx([0, 0.3, 5, 5.3, 10], abs=1 / fps)


def test_one_frame_is_a_video(decoder: VideoDecoder) -> None:
    assert taken(decoder, video(1)) == [0]
    assert decoder.measure(video(1), BOUNDS, EIGHT).metadata()["frames_indices"] == [0]


def test_sound_is_left_alone(decoder: VideoDecoder) -> None:
    assert taken(decoder, video(with_sound=True)) == EVENLY


def test_a_file_in_fragments(decoder: VideoDecoder) -> None:
    content = video(container_options={"movflags": "frag_keyframe+empty_moov+default_base_moof"}, options={"g": "10"})
    assert taken(decoder, content) == EVENLY


@pytest.mark.parametrize(("turn", "corner"), [(90, (0, -1)), (180, (-1, -1)), (270, (-1, 0))])
def test_frames_are_turned_as_the_file_says(decoder: VideoDecoder, turn: int, corner: tuple[int, int]) -> None:
    """By the matrix that phones write, clockwise; the white mark is in the upper left of what was encoded."""
    chosen, frames = decoder.decode(turned(video(), turn), BOUNDS, EIGHT)
    assert (chosen.height, chosen.width) == ((48, 64) if turn == 180 else (64, 48))
    y, x = corner
    assert frames.pixels[3, y, x].min() > 200


def turned(content: bytes, degrees: int) -> bytes:
    """The track header's matrix with a rotation: it lies 48 bytes behind the box's name, nine numbers of 16.16."""
    cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    at = content.index(b"tkhd") + 4 + 40
    matrix = struct.pack(">9i", cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 1 << 30)
    return content[:at] + matrix + content[at + 36 :]


def zipped() -> bytes:
    archive = BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.mp4", video(2))
    return archive.getvalue()


def patched(content: bytes, box: bytes, at: int, value: int) -> bytes:
    """The 32 bits that lie so far behind a box's name."""
    start = content.index(box) + 4 + at
    return content[:start] + struct.pack(">I", value) + content[start + 4 :]


FAST = {"movflags": "faststart"}
NO_VIDEOS: dict[str, Callable[[], bytes]] = {
    "text": lambda: b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n",
    "list of files": lambda: b"ffconcat version 1.0\nfile '/etc/passwd'\n",
    "empty": lambda: b"",
    "picture": lambda: b"\x89PNG\r\n\x1a\n" + bytes(64),
    "archive": zipped,
    "AVI": lambda: video(3, codec="mpeg4", container="avi"),
    "archive with the name of a video": lambda: b"\x00\x00\x00\x18ftypisom" + zipped(),
    "only a head": lambda: video()[:40],
    "MP4 that lost its end": lambda: video()[:-200],
    "MP4 that lost its end, contents first": lambda: video(container_options=FAST)[:-500],
    "sound only": lambda: video(1, with_sound=True).replace(b"vide", b"soun"),
}


@pytest.mark.parametrize("make", NO_VIDEOS.values(), ids=NO_VIDEOS)
def test_what_is_no_video_is_refused(decoder: VideoDecoder, make: Callable[[], bytes]) -> None:
    with pytest.raises(DamagedVideo):
        decoder.decode(make(), BOUNDS, EIGHT)


def test_a_header_that_lies_about_the_length_changes_nothing(decoder: VideoDecoder) -> None:
    """The frames' own times count."""
    assert taken(decoder, patched(video(container_options=FAST), b"mdhd", 16, 2**31)) == EVENLY


def test_a_webm_that_lost_its_end_has_the_frames_that_are_left(decoder: VideoDecoder) -> None:
    """As every player takes it: nothing in the file says how many there were."""
    content = video(codec="libvpx", container="webm", options={"b:v": "2M"})
    left = taken(decoder, content[: len(content) * 3 // 4])
    assert left[0] == 0 and 30 < left[-1] < 59


TOO_LARGE: dict[str, Callable[[], bytes]] = {
    "frames": lambda: video(2, 1280, 720, options={"preset": "ultrafast"}),
    "long, by its frames": lambda: video(3, times=[0, 1, 100]),
    "many": lambda: video(3001, 16, 16, rate=100, options={"preset": "ultrafast"}),
    "many, by its header": lambda: patched(video(container_options=FAST), b"stsz", 8, 1_000_000),
}


@pytest.mark.parametrize("make", TOO_LARGE.values(), ids=TOO_LARGE)
def test_too_much_is_refused_before_anything_is_decoded(decoder: VideoDecoder, make: Callable[[], bytes]) -> None:
    with pytest.raises(VideoError):
        decoder.measure(make(), BOUNDS, EIGHT)


def test_the_sum_of_the_frames_is_bounded(decoder: VideoDecoder) -> None:
    with pytest.raises(VideoTooLarge, match="8 frames of 64x48"):
        decoder.measure(video(), replace(BOUNDS, pixels=7 * 64 * 48), EIGHT)


def test_a_stream_that_changes_its_size_is_refused(decoder: VideoDecoder) -> None:
    small, large = (video(10, *size, codec="libvpx", container="webm") for size in ((64, 48), (128, 96)))
    with pytest.raises(DamagedVideo, match="not all of the size"):
        decoder.decode(joined([small, large], "webm"), BOUNDS, EIGHT)


def test_a_bomb_behind_a_small_header_is_not_decoded(decoder: VideoDecoder) -> None:
    """The header says 64 x 48; a frame in it has 8 megapixels."""
    bomb = joined(
        [video(2, codec="libvpx", container="webm"), video(2, 4096, 2048, codec="libvpx", container="webm")], "webm"
    )
    with pytest.raises(VideoError):
        decoder.decode(bomb, BOUNDS, EIGHT)


def test_memory_is_bounded(decoder: VideoDecoder) -> None:
    content = video(40, 640, 480, options={"preset": "ultrafast"})
    with pytest.raises(VideoError):  # the libraries do not always say what they lacked
        decoder.decode(content, replace(BOUNDS, memory_bytes=1 << 20), EIGHT)
    assert len(taken(decoder, content)) == 8


def test_time_is_bounded(decoder: VideoDecoder) -> None:
    """One key frame, then more work than a second allows."""
    part = video(100, 640, 480, codec="libvpx", container="webm", options={"deadline": "realtime", "cpu-used": "8"})
    content = joined([part] * 29, "webm")
    bounds = replace(BOUNDS, seconds=1000, pixels=2900 * 640 * 480, work_s=0.5)
    start = time.monotonic()
    with pytest.raises(VideoTooLarge, match="time or memory"):
        decoder.decode(content, bounds, FrameRule(2900))
    assert time.monotonic() - start < 30  # the bound, and a busy machine


def test_damage_anywhere_is_frames_or_a_refusal(decoder: VideoDecoder) -> None:
    files = [video(20, options={"g": "5"}), video(20, codec="libvpx-vp9", container="webm", options={"g": "5"})]
    random_ = random.Random(0)
    refused = 0
    for turn in range(150):
        content = bytearray(files[turn % 2])
        for _ in range(random_.choice((1, 4, 30))):
            content[random_.randrange(len(content))] = random_.randrange(256)
        try:
            decoder.decode(bytes(content), BOUNDS, EIGHT)
        except VideoError:
            refused += 1
    assert refused > 20
    assert taken(decoder, files[0], FrameRule(20)) == list(range(20))


def test_nothing_is_left_behind(decoder: VideoDecoder) -> None:
    content = video(8)
    decoder.decode(content, BOUNDS, EIGHT)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        decoder.decode(content, BOUNDS, EIGHT)
        with pytest.raises(DamagedVideo):
            decoder.decode(content[:100], BOUNDS, EIGHT)
    assert len(os.listdir("/proc/self/fd")) == before
    (fork_server,) = fork_servers()
    deadline = time.monotonic() + 10
    while fork_server.children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not fork_server.children()


def test_a_decoder_that_is_killed_is_replaced(decoder: VideoDecoder) -> None:
    assert taken(decoder, video(8)) == list(range(8))
    (fork_server,) = fork_servers()
    fork_server.kill()
    fork_server.wait(10)
    assert taken(decoder, video(8)) == list(range(8))
    assert len(fork_servers()) == 1


def test_a_decoder_that_cannot_start_is_the_servers_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    decoder = VideoDecoder()
    with pytest.raises(DecoderUnavailable):
        decoder.decode(video(2), BOUNDS, EIGHT)
    decoder.close()


def test_pixels_can_be_given_back_while_somebody_holds_them(decoder: VideoDecoder) -> None:
    _, frames = decoder.decode(video(40, 640, 480, options={"preset": "ultrafast"}), BOUNDS, FrameRule(32))
    held = frames.pixels[5]
    assert held.max() > 0
    frames.release()
    assert held.max() == 0


def fork_servers() -> list[psutil.Process]:
    alive = (child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE)  # of other tests
    return [child for child in alive if "fork_server" in " ".join(child.cmdline())]


@pytest.mark.parametrize("frames", [1, 2, 7, 32])
@pytest.mark.parametrize("fps", [None, 0.5, 2.0, 30.0])
def test_a_rule_takes_at_most_so_many_in_order(frames: int, fps: float | None) -> None:
    random_ = random.Random(frames)
    for _ in range(50):
        times = sorted(random_.uniform(0, 20) for _ in range(random_.randint(1, 100)))
        places = FrameRule(frames, fps).choose(times)
        assert 1 <= len(places) <= frames and places[0] == 0
        assert all(a < b for a, b in pairwise(places))
        if fps is not None:
            assert len(places) <= (times[-1] - times[0]) * fps + 1.5
        if len(places) > 1:
            assert places[-1] == len(times) - 1


def test_a_list_of_pictures_has_a_second_each() -> None:
    meta = ChosenFrames.of_pictures(3, 10, 20).metadata()
    assert (meta["fps"], meta["frames_indices"], meta["duration"]) == (1.0, [0, 1, 2], 3.0)


def test_the_decoders_process_has_nothing_of_the_servers() -> None:
    """It is forked for each file: what it imports is what a stranger's file could reach."""
    source = Path(__file__).parents[2] / "server" / "video"
    assert not any("vllm" in file.read_text().replace("vLLM", "") for file in source.glob("*.py"))
