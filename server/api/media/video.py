"""Videos, from a file or a list of pictures, as frames under the request's budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Protocol

import numpy as np
from vllm.multimodal.media import MediaWithBytes

from foldserve.server.api.errors import InvalidImage, LimitExceeded, Unavailable
from foldserve.server.api.media.budget import MediaBudget
from foldserve.server.api.media.convert import Colour
from foldserve.server.api.media.decode import ImageFile
from foldserve.server.video.decoder import DecoderUnavailable, Frames, VideoDecoder
from foldserve.server.video.frames import ChosenFrames, DamagedVideo, VideoTooLarge

_RETRY_AFTER_S = 2


class VideoSource(Protocol):
    """A video whose size is known and counted."""

    @property
    def decoded_pixels(self) -> int:
        """Of all frames."""

    def decode(self, mode: str | None, background: Colour) -> LoadedVideo:
        """The frames; raises InvalidRequest. `background` goes behind transparent pictures."""


@dataclass(frozen=True, slots=True)
class LoadedVideo:
    """The frames of a video; `identity` is a hash of the file and of the rule that chose its frames."""

    frames: Frames
    chosen: ChosenFrames
    identity: bytes

    def for_vllm(self, salt: str | None) -> Any:
        """In the form of vLLM's loader. Caches identify it by the bytes beside the frames, which hold the salt."""
        digest = sha256(self.identity + (salt or "").encode()).digest()  # shorter than any frame: vLLM hashes it
        return MediaWithBytes((self.frames.pixels, self.chosen.metadata()), digest)


@dataclass(frozen=True, slots=True)
class VideoFile:
    """A file whose container has been read."""

    content: bytes
    chosen: ChosenFrames
    budget: MediaBudget
    decoder: VideoDecoder

    @classmethod
    def open(cls, content: bytes, budget: MediaBudget, decoder: VideoDecoder) -> VideoFile:
        """Reads the container, and counts the frames that will be taken.

        Raises:
            InvalidImage: not a video, or damaged.
            LimitExceeded: too large.
        """
        with _translated():
            chosen = decoder.measure(content, budget.limits.video_bounds, budget.limits.video_rule)
        budget.admit_frames(chosen.count, chosen.width, chosen.height)
        return cls(content, chosen, budget, decoder)

    @property
    def decoded_pixels(self) -> int:
        return self.chosen.count * self.chosen.width * self.chosen.height

    def decode(self, mode: str | None, background: Colour) -> LoadedVideo:
        limits = self.budget.limits
        with _translated():
            chosen, frames = self.decoder.decode(self.content, limits.video_bounds, limits.video_rule)
        return LoadedVideo(frames, chosen, sha256(repr(limits.video_rule).encode() + self.content).digest())


@dataclass(frozen=True, slots=True)
class PictureList:
    """A list of pictures, one a second, whose headers have been read."""

    files: Sequence[ImageFile]

    @classmethod
    def open(cls, contents: Sequence[bytes], budget: MediaBudget) -> PictureList:
        """Reads the headers, and counts the pixels.

        Raises:
            InvalidImage: not a picture, or of another size than the first.
            LimitExceeded: too large.
        """
        files = [budget.admit(ImageFile.open(content)) for content in contents]
        if len({file.size for file in files}) > 1:
            raise InvalidImage("the pictures of a list must all have one size")
        return cls(files)

    @property
    def decoded_pixels(self) -> int:
        return sum(file.decoded_pixels for file in self.files)

    def decode(self, mode: str | None, background: Colour) -> LoadedVideo:
        frames: Frames | None = None
        for i, file in enumerate(self.files):
            picture = np.asarray(file.decode("RGB", background).media)
            if frames is None:
                frames = Frames((len(self.files), *picture.shape))  # RGB: (height, width, 3)
            elif picture.shape != frames.pixels.shape[1:]:
                raise InvalidImage("the pictures of a list must all have one size, once they are upright")
            frames.pixels[i] = picture
        assert frames is not None
        chosen = ChosenFrames.of_pictures(len(self.files), *frames.pixels.shape[1:3])
        return LoadedVideo(frames, chosen, sha256(b"".join(sha256(f.content).digest() for f in self.files)).digest())


@contextmanager
def _translated() -> Iterator[None]:
    """Converts a decoder's errors into those of the tree."""
    try:
        yield
    except DamagedVideo as error:
        raise InvalidImage(str(error)) from error
    except VideoTooLarge as error:
        raise LimitExceeded(str(error)) from error
    except DecoderUnavailable as error:
        raise Unavailable("the server can't decode videos at the moment: try again later", _RETRY_AFTER_S) from error
