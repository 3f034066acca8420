"""Wall time to decode the frames of a video file: `python -m foldserve.loadtest.micro.video`.

Compares our decoder, which checks the container and decodes in a process per file, with vLLM's loader (OpenCV), which
decodes in the server's process, in pairs on the same files.
"""

from __future__ import annotations

import io
import json
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import av
import numpy as np
from vllm.multimodal.media import ImageMediaIO
from vllm.multimodal.media.video import VideoMediaIO

from foldserve.loadtest.micro.pairs import Ratio, alternate, ratio
from foldserve.server.limits import Limits
from foldserve.server.video.decoder import VideoDecoder

FILES = (("libx264", "mp4", 10), ("libx264", "mp4", 120), ("libvpx-vp9", "webm", 10))
"""Encoder, container, seconds."""
_FPS = 25


def noisy(codec: str, container: str, seconds: int, width: int, height: int) -> bytes:
    """A video file that moves over a coarse pattern."""
    pattern = np.random.default_rng(0).integers(0, 256, (height // 16, width // 8, 3), dtype=np.uint8)
    whole = pattern.repeat(16, 0).repeat(16, 1)
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        options = {"preset": "ultrafast"} if codec == "libx264" else {"deadline": "realtime", "cpu-used": "8"}
        stream: Any = output.add_stream(codec, rate=_FPS, options={"g": "50", **options})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(seconds * _FPS):
            x = i * 4 % width
            view = np.ascontiguousarray(whole[:height, x : x + width])
            output.mux(stream.encode(av.VideoFrame.from_ndarray(view, format="rgb24")))
        output.mux(stream.encode())
    return file.getvalue()


def wall_ms(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def measure(width: int, height: int, pairs: int) -> dict[str, dict[str, object]]:
    """Ours / vLLM's for each file, and both in milliseconds; the first pair is not counted."""
    decoder, limits = VideoDecoder(), Limits()
    theirs = VideoMediaIO(ImageMediaIO(), num_frames=limits.video_frames, video_backend="opencv")
    found: dict[str, dict[str, object]] = {}
    for codec, container, seconds in FILES:
        content = noisy(codec, container, seconds, width, height)

        def ours(content: bytes = content) -> None:
            decoder.measure(content, limits.video_bounds, limits.video_rule)
            decoder.decode(content, limits.video_bounds, limits.video_rule)

        costs = alternate(partial(wall_ms, ours), partial(wall_ms, partial(theirs.load_bytes, content)), pairs + 1)[1:]
        name = f"{codec}, {seconds} s of {width}x{height}, {len(content) / 1e6:.1f} MB"
        each: Ratio = ratio(costs)
        times = {"ours_ms": median(a for a, _ in costs), "vllm_ms": median(b for _, b in costs)}
        found[name] = {"ratio": asdict(each)} | {key: round(value, 1) for key, value in times.items()}
        print(f"{name}: {found[name]['ours_ms']} ms, ours / vLLM's {each}", flush=True)
    decoder.close()
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--size", type=int, nargs=2, default=(1280, 720), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args(argv)
    width, height = args.size
    figures = measure(width, height, args.pairs)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
