"""The request for a video file's frames, and its result."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

BEGUN = b"\n"
"""A file's process writes this first: if nothing follows, the fault is the file's, not the server's."""
_SAME_S = 1e-4  # times that are meant to be equal differ by rounding
_SAMPLED_AT = 1.0  # frames a second of a list of pictures, as in vLLM


class VideoError(ValueError):
    """A video that can't be used; the message is for whoever sent it."""


class DamagedVideo(VideoError):
    """Not a video, of an unsupported kind, or damaged."""


class VideoTooLarge(VideoError):
    """A video beyond the bounds."""


@dataclass(frozen=True, slots=True)
class VideoBounds:
    """Limits of one file.

    Attributes:
        seconds: length of the video.
        frame_pixels: width x height of a frame.
        pixels: of all frames that are taken.
        file_frames: frames in the file.
        work_s: processor time, and as much again of waiting for a processor.
        memory_bytes: besides the file.
    """

    seconds: float
    frame_pixels: int
    pixels: int
    file_frames: int
    work_s: float
    memory_bytes: int = 1 << 29


@dataclass(frozen=True, slots=True)
class FrameRule:
    """Which frames are taken: evenly spaced in time, the first and the last among them, at most `frames`.

    `fps` is the most frames a second; None for as many as `frames` allows.
    """

    frames: int
    fps: float | None = None

    def choose(self, times: Sequence[float]) -> list[int]:
        """Indices of the frames to take, ascending and distinct.

        `times` are when all frames start, in seconds, ascending.
        """
        first, length = times[0], times[-1] - times[0]
        count = min(self.frames, len(times))
        if self.fps is not None:
            count = min(count, int(length * self.fps + 0.5) + 1)
        if count == 1:
            return [0]
        spaced = (first + length * i / (count - 1) for i in range(count))
        return sorted({bisect_right(times, time + _SAME_S) - 1 for time in spaced})


@dataclass(frozen=True, slots=True)
class ChosenFrames:
    """The frames that were taken: `count` of `height` x `width` pixels, upright.

    Attributes:
        times: start of each, in seconds since the file's first frame.
        file_frames: frames in the file.
        seconds: length of the video.
    """

    count: int
    height: int
    width: int
    times: tuple[float, ...]
    file_frames: int
    seconds: float

    @classmethod
    def of_pictures(cls, count: int, height: int, width: int) -> ChosenFrames:
        return cls(count, height, width, tuple(i / _SAMPLED_AT for i in range(count)), count, count / _SAMPLED_AT)

    def metadata(self) -> dict[str, object]:
        """In the form of vLLM's loaders. A frame's index is its time at the file's mean rate; the rate may vary."""
        fps = self.file_frames / self.seconds if self.seconds else _SAMPLED_AT
        return {
            "total_num_frames": self.file_frames,
            "fps": fps,
            "duration": self.seconds,
            "video_backend": "foldserve",
            "frames_indices": [min(round(time * fps), self.file_frames - 1) for time in self.times],
            "do_sample_frames": False,
        }
