"""Small videos for tests: the grey of each frame tells which one it is."""

from __future__ import annotations

import base64
import io
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.stream import VideoStream
from numpy.typing import NDArray

STEP = 4
"""Of grey, from a frame to the next."""


def frame(number: int, width: int, height: int) -> av.VideoFrame:
    """Grey by its number, with a white mark in its upper left corner."""
    pixels = np.full((height, width, 3), number * STEP % 256, np.uint8)
    pixels[: height // 4, : width // 4] = 255
    return av.VideoFrame.from_ndarray(pixels, format="rgb24")


def video(
    frames: int = 60,
    width: int = 64,
    height: int = 48,
    *,
    codec: str = "libx264",
    container: str = "mp4",
    rate: int = 10,
    times: Sequence[float] = (),
    with_sound: bool = False,
    options: Mapping[str, str] | None = None,
    container_options: Mapping[str, str] | None = None,
) -> bytes:
    """A file; `times` in seconds says when each frame begins, instead of `rate`."""
    path = Path(tempfile.mkdtemp(prefix="foldserve-video-")) / f"video.{container}"  # some options read the file again
    with av.open(path, "w", format=container, options=dict(container_options or {})) as output:
        stream: Any = output.add_stream(codec, rate=rate, options={"crf": "18", **(options or {})})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        sound: Any = output.add_stream("aac" if container == "mp4" else "libopus", rate=48000) if with_sound else None
        for i in range(frames):
            picture = frame(i, width, height)
            picture.time_base = Fraction(1, 1000)
            picture.pts = round(1000 * (times[i] if times else i / rate))
            output.mux(stream.encode(picture))
        output.mux(stream.encode())
        if sound is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((2, 960), np.float32), format="fltp", layout="stereo")
            silence.sample_rate, silence.pts = 48000, 0
            output.mux(sound.encode(silence))
            output.mux(sound.encode())
    content = path.read_bytes()
    shutil.rmtree(path.parent)
    return content


def joined(parts: Sequence[bytes], container: str) -> bytes:
    """One stream with the packets of all parts, in the order given, and the header of the first."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream: VideoStream | None = None
        end = 0
        for part in parts:
            with av.open(io.BytesIO(part), "r") as source:
                first = source.streams.video[0]
                stream = stream or output.add_stream_from_template(first)
                packets = [packet for packet in source.demux(first) if packet.size]
                shift = end
                for packet in packets:
                    end = max(end, shift + (packet.pts or 0) + (packet.duration or 1))
                    packet.pts, packet.dts = (packet.pts or 0) + shift, (packet.dts or 0) + shift
                    packet.stream = stream
                    output.mux(packet)
    return file.getvalue()


def numbers(pixels: NDArray[np.uint8]) -> list[int]:
    """Which frames these are, (frames, height, width, 3)."""
    grey = pixels[:, pixels.shape[1] * 3 // 4, pixels.shape[2] * 3 // 4].mean(-1)
    return [round(float(value) / STEP) for value in grey]


def data_uri(content: bytes, kind: str = "mp4") -> str:
    return f"data:video/{kind};base64,{base64.b64encode(content).decode()}"
