"""A video file's frames, under bounds. Runs in a process of its own, see `fork_server`."""

from __future__ import annotations

import io
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from foldserve.server.video.frames import ChosenFrames, DamagedVideo, FrameRule, VideoBounds, VideoTooLarge

_CODECS = frozenset({"av1", "h264", "hevc", "libdav1d", "mpeg4", "vp8", "vp9"})
_MOST_STREAMS = 32

Pixels = NDArray[np.uint8]
Put = Callable[[Pixels], None]  # (height, width, 3)


@dataclass(frozen=True, slots=True)
class _Packet:
    """A frame in the container, not decoded."""

    pts: int
    is_key: bool


def demuxer(head: bytes) -> str:
    """FFmpeg's name of the only demuxer that may read the file; some others would open further files.

    Raises DamagedVideo if the file is neither MP4 nor WebM.
    """
    if head[4:8] == b"ftyp":
        return "mov"
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    raise DamagedVideo("the file is no MP4 or WebM video")


def read(file: io.BufferedIOBase, bounds: VideoBounds, rule: FrameRule, put: Put | None) -> ChosenFrames:
    """Passes the chosen frames of a file to `put`, upright and in RGB.

    Without `put`, decodes nothing and finds only their number and size, as before rotation.

    Raises:
        DamagedVideo: not a video, or damaged.
        VideoTooLarge: beyond the bounds; found in the header if that tells.
    """
    head = file.read(8)
    file.seek(0)
    try:
        with av.open(file, "r", format=demuxer(head), metadata_errors="ignore") as container:
            return _read(container, bounds, rule, put)
    except MemoryError as error:  # FFmpeg's too
        raise VideoTooLarge("the video takes too much memory to decode: make it smaller") from error
    except (av.FFmpegError, OSError, EOFError, OverflowError, UnicodeError) as error:
        raise _damaged() from error


def _read(container: InputContainer, bounds: VideoBounds, rule: FrameRule, put: Put | None) -> ChosenFrames:
    stream = _stream(container)
    _check_header(container, stream, bounds)
    packets = _packets(container, stream, bounds)
    base = float(stream.time_base or 0)
    times = [(packet.pts - packets[0].pts) * base for packet in packets]
    if times[-1] > bounds.seconds:
        raise _too_long(times[-1], bounds)
    places = rule.choose(times)
    width, height = stream.codec_context.width, stream.codec_context.height
    if len(places) * width * height > bounds.pixels:
        raise VideoTooLarge(
            f"{len(places)} frames of {width}x{height} have more than {bounds.pixels / 1e6:g} megapixels together"
        )
    height_width = (height, width) if put is None else _decode(container, stream, packets, places, put)
    step = times[-1] / (len(times) - 1) if len(times) > 1 else 0.0
    return ChosenFrames(
        len(places), *height_width, tuple(times[place] for place in places), len(times), times[-1] + step
    )


def _decode(
    container: InputContainer, stream: VideoStream, packets: Sequence[_Packet], places: Sequence[int], put: Put
) -> tuple[int, int]:
    """Decodes the frames at `places`, and returns their height and width."""
    size = stream.codec_context.width, stream.codec_context.height
    shape: tuple[int, ...] = ()
    for frame in _decoded(container, stream, packets, places):
        if (frame.width, frame.height) != size:
            raise DamagedVideo("the video's frames are not all of the size that its header says")
        pixels = _upright(frame)
        if shape and pixels.shape != shape:
            raise DamagedVideo("the video's frames are not all turned the same way")
        shape = pixels.shape
        put(pixels)
    return shape[0], shape[1]


def _stream(container: InputContainer) -> VideoStream:
    if len(container.streams) > _MOST_STREAMS:
        raise DamagedVideo(f"the file has more than {_MOST_STREAMS} streams")
    stream = next(iter(container.streams.video), None)
    if stream is None:
        raise DamagedVideo("the file has no video in it")
    name = stream.codec_context.name
    if name not in _CODECS:
        raise DamagedVideo("the video's codec is not taken: use H.264, HEVC, VP8, VP9, AV1 or MPEG-4")
    return stream


def _check_header(container: InputContainer, stream: VideoStream, bounds: VideoBounds) -> None:
    """Checks what the container says, before anything is decoded."""
    context = stream.codec_context
    width, height = context.width, context.height
    if not width or not height or not stream.time_base:
        raise _damaged()
    if width * height > bounds.frame_pixels:
        most = f"{bounds.frame_pixels / 1e6:g} megapixels"
        raise VideoTooLarge(f"the video is {width}x{height}: more than {most} a frame; make it smaller")
    lengths = [container.duration / av.time_base if container.duration else 0.0]
    lengths.append(float(stream.duration * stream.time_base) if stream.duration else 0.0)
    if max(lengths) > bounds.seconds:
        raise _too_long(max(lengths), bounds)
    if stream.frames > bounds.file_frames:
        raise _too_many(bounds)
    context.thread_count = 1
    context.options = {"max_pixels": str(bounds.frame_pixels)}  # a stream may have another size than its container says


def _packets(container: InputContainer, stream: VideoStream, bounds: VideoBounds) -> list[_Packet]:
    """All frames that are shown, by their time; decodes nothing."""
    packets: dict[int, _Packet] = {}
    count = 0
    for packet in container.demux(stream):
        if packet.size == 0:  # the last one, which flushes decoders
            continue
        count += 1
        if count > bounds.file_frames:
            raise _too_many(bounds)
        if packet.is_corrupt:
            raise _damaged()
        pts = packet.pts if packet.pts is not None else packet.dts
        if pts is not None and not packet.is_discard:
            packets.setdefault(pts, _Packet(pts, packet.is_keyframe))
    if not packets or count < stream.frames:  # WebM's header does not say how many there are
        raise _damaged()
    return [packets[pts] for pts in sorted(packets)]


def _decoded(
    container: InputContainer, stream: VideoStream, packets: Sequence[_Packet], places: Sequence[int]
) -> Iterator[VideoFrame]:
    """The frames at these places of `packets`; seeks to a key frame if that saves work."""
    keys = [place for place, packet in enumerate(packets) if packet.is_key]
    key_of = {place: keys[max(0, bisect_right(keys, place) - 1)] if keys else 0 for place in places}
    at = -1  # the last frame that was decoded
    frames: Iterator[VideoFrame] = iter(())
    for place in places:
        if at < 0 or key_of[place] > at:
            container.seek(packets[key_of[place]].pts, stream=stream, backward=True)
            frames = container.decode(stream)
        wanted = packets[place].pts
        frame = next((frame for frame in frames if frame.pts is not None and frame.pts >= wanted), None)
        if frame is None or frame.pts != wanted or frame.is_corrupt:
            raise _damaged()
        at = place
        yield frame


def _upright(frame: VideoFrame) -> Pixels:
    pixels: Any = frame.to_ndarray(format="rgb24")
    quarters = round(frame.rotation / 90)
    return np.ascontiguousarray(np.rot90(pixels, quarters))


def _damaged() -> DamagedVideo:
    return DamagedVideo("the video file is damaged or cut short")


def _too_long(seconds: float, bounds: VideoBounds) -> VideoTooLarge:
    shown = f"{seconds:.0f} s" if math.isfinite(seconds) and seconds < 1e9 else "an endless time"
    return VideoTooLarge(f"the video takes {shown}: at most {bounds.seconds:g} s are allowed; cut it")


def _too_many(bounds: VideoBounds) -> VideoTooLarge:
    return VideoTooLarge(f"the video has more than {bounds.file_frames} frames: lower its frame rate, or cut it")
